"""Run what surrounds a chain of blocks, while the blocks themselves only pass their hidden states on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tdkit.calibration.chains import Call, Names, broken, hidden_states
from tdkit.support.compatibility import tree_leaves

At = Callable[[int, Tensor, Call], Tensor]
"""``at(number, hidden, call)``: called in the place of a block; returns its hidden states."""

Form = Callable[[Tensor], Any]
"""Puts hidden states into the form in which a block returns them."""


@dataclass
class Seen:
    """What one run of a model showed of its blocks.

    Attributes:
        calls: the arguments of each block, without the hidden states.
        forms: the form of the output of each.
        last: the hidden states that the last one returned, alone.
    """

    calls: list[Call] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)


class StopRun(Exception):  # noqa: N818, no error: it ends a forward pass that has done what it was run for
    """Raised in the place of a block to skip the rest of the forward pass."""


@contextmanager
def in_place_of_blocks(model: nn.Module, names: Names, forms: Sequence[Form], at: At) -> Iterator[None]:
    """A context manager inside which `at` runs in the place of each block."""
    blocks = [model.get_submodule(name) for name in names]

    def replacement(number: int) -> Callable[..., Any]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return forms[number](at(number, hidden, (args, kwargs)))

        return forward

    try:
        for number, block in enumerate(blocks):
            vars(block)["forward"] = replacement(number)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


@contextmanager
def watched(model: nn.Module, names: Names) -> Iterator[Seen]:
    """A context manager inside which the model runs once; what it yields is filled in meanwhile.

    Raises:
        CalibrationError: when the blocks do not follow each other.
    """
    blocks = [model.get_submodule(name) for name in names]
    seen = Seen()

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = len(seen.calls)
        if number >= len(blocks) or blocks[number] is not block:
            raise broken(names[min(number, len(names) - 1)], "is not called once, after the blocks before it")
        if not args or not isinstance(args[0], Tensor):
            raise broken(names[number], "does not take its hidden states as the first argument")
        if number and args[0] is not seen.last[0]:
            raise broken(names[number], f"does not take what {names[number - 1]} returned")
        seen.calls.append((args[1:], kwargs))

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        seen.last[:] = [hidden_states(output)]
        seen.forms.append(_form(output, names[len(seen.forms)]))

    handles = []
    try:
        for block in dict.fromkeys(blocks):
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    if len(seen.calls) < len(names):
        raise broken(names[len(seen.calls)], "was not called")


def _form(output: Any, name: str) -> Form:
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    kind, rest = type(output), tuple(output[1:])
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(rest)):
        raise broken(name, "returns more than its hidden states")
    return lambda hidden: kind((hidden, *rest))
