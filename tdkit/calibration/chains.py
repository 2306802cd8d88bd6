"""Find chains of blocks in a model, each of which takes the hidden states that the previous one returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tdkit.calibration.runner import Runner
from tdkit.errors import CalibrationError
from tdkit.models.sites import Site
from tdkit.support.compatibility import submodules_of

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a block, without the hidden states

Names = tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """A chain of blocks.

    Attributes:
        names: the names of the blocks, in order.
        hidden: for each batch, the input of the first block.
        calls: for each block and batch, the other arguments of the block.
    """

    names: Names
    hidden: list[Tensor]
    calls: list[list[Call]]


@dataclass(frozen=True)
class Blocks:
    """The children of a list of modules, which may form a chain.

    Attributes:
        choices: the names of the blocks, at first the finest: the children of the lists inside the children.
        params: the number of parameters of the sites in them.
    """

    choices: tuple[Names, ...]
    params: int


def blocks_of(model: nn.Module, sites: Sequence[Site]) -> list[Blocks]:
    """Returns the blocks of each outermost `nn.ModuleList` and `nn.Sequential` that holds a site, the largest first.

    Raises:
        CalibrationError: when there are none.
    """
    found = []
    for name in _lists(model):
        children = _children(model, name)
        params = sum(site.params for site in sites if within(site, children))
        if params:
            finest = tuple(block for child in children for block in _inner(model, child))
            found.append(Blocks((finest, children) if finest != children else (children,), params))
    if not found:
        raise CalibrationError(
            "working block by block (sequential=True, or from files) needs blocks in an nn.ModuleList or nn.Sequential "
            "that holds the layers to rewrite: this model has none; compress it without, in memory"
        )
    return sorted(found, key=lambda blocks: -blocks.params)


def within(site: Site, names: Sequence[str]) -> bool:
    """Returns whether a site is one of the modules called `names` or inside of one."""
    return any(site.name == name or site.name.startswith(f"{name}.") for name in names)


def _lists(module: nn.Module, prefix: str = "") -> list[str]:
    """Returns the names of the outermost lists of two or more modules in a module, itself included."""
    if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
        return [prefix]
    children = module.named_children()
    return [name for child, inner in children for name in _lists(inner, f"{prefix}.{child}" if prefix else child)]


def _children(model: nn.Module, name: str) -> Names:
    return tuple(f"{name}.{child}" if name else child for child in submodules_of(model.get_submodule(name)))


def _inner(model: nn.Module, name: str) -> Names:
    """Returns the names of the children of the one list inside a block, or of the block if there is no such list."""
    lists = _lists(model.get_submodule(name), name)
    return _children(model, lists[0]) if len(lists) == 1 else (name,)


def in_order_of_calls(model: nn.Module, blocks: Sequence[Blocks], batch: Any) -> list[Blocks]:
    """Returns those of `blocks` that a run of the model calls, in the order of their first calls."""
    order: list[Blocks] = []

    def note(which: Blocks) -> Callable[..., None]:
        return lambda *_: order.append(which) if which not in order else None

    handles = [
        model.get_submodule(name).register_forward_pre_hook(note(which))
        for which in blocks
        for name in which.choices[-1]
    ]
    try:
        Runner(model, gradients=False).forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return order


def finest_chain(model: nn.Module, blocks: Blocks, batch: Any) -> Names:
    """Returns the names of the finest of the blocks that form a chain when the model runs on a batch.

    Raises:
        CalibrationError: when none do; the message has the reason for the coarsest.
    """
    for names in blocks.choices[:-1]:
        try:
            return trace(model, names, [batch]).names
        except CalibrationError:
            continue
    return trace(model, blocks.choices[-1], [batch]).names


class _StopError(Exception):
    """Raised before the last block runs, to skip the rest of the forward pass."""


def trace(model: nn.Module, names: Names, batches: list[Any]) -> Chain:
    """Run the batches once and record the inputs of the first block and the other arguments of every block.

    Raises:
        CalibrationError: when the blocks are not called one after the other, once per batch, or the first argument of
            a block is not the output of the previous one.
    """
    blocks = [model.get_submodule(name) for name in names]
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in names]
    previous: list[Tensor] = []  # what each block of this batch returned

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = len(previous)
        if blocks[number] is not block:
            raise broken(names[number], "is not called once, after the blocks before it")
        if not args or not isinstance(args[0], Tensor):
            raise broken(names[number], "does not take its hidden states as the first argument")
        if number == 0:
            hidden.append(args[0].clone())  # the block may change it in place
        elif args[0] is not previous[-1]:
            raise broken(names[number], f"does not take what {names[number - 1]} returned")
        calls[number].append((args[1:], kwargs))
        if number == len(names) - 1:
            raise _StopError

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        previous.append(hidden_states(output))

    handles = []
    runner = Runner(model, gradients=False)
    try:
        for block in dict.fromkeys(blocks):
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        with without_cache(model):
            for batch in batches:
                previous.clear()
                try:
                    runner.forward(batch)
                except _StopError:
                    continue
                raise broken(names[len(previous)], "was not called")
    finally:
        for handle in handles:
            handle.remove()
    return Chain(names, hidden, calls)


def broken(name: str, what: str) -> CalibrationError:
    """Returns the error about a block that breaks a chain."""
    return CalibrationError(
        f"working block by block (sequential=True, or from files) needs blocks that follow each other, but {name} "
        f"{what}: compress without, in memory"
    )


def hidden_states(output: Any) -> Tensor:
    """Returns the hidden states in the output of a block: the output or its first entry.

    Raises:
        CalibrationError: when this is no tensor.
    """
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise CalibrationError(
            f"working block by block needs blocks that return their hidden states, alone or first in a tuple, not a "
            f"{type(output).__name__}: compress without, in memory"
        )
    return hidden


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Disable the key-value cache that transformers models pass to their blocks: every rerun would extend it.

    The parts of a model, such as the decoder of T5, may have a config of their own.
    """
    parts: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    cached = {id(config): (config, config.use_cache) for config in parts if getattr(config, "use_cache", None)}
    try:
        for config, _ in cached.values():
            config.use_cache = False
        yield
    finally:
        for config, value in cached.values():
            config.use_cache = value
