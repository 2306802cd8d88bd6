"""Fit a model block by block, each with the inputs that the already compressed blocks produce."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.calibration import Calibration
from tdkit.calibration.moments import Recorder
from tdkit.calibration.runner import Runner, as_it_was
from tdkit.compression.fit import fit_step
from tdkit.errors import CalibrationError
from tdkit.fitting.metric import Metric
from tdkit.models.sites import Site
from tdkit.models.swap import Fitted, Swap
from tdkit.planning.step import Step
from tdkit.support.progress import progress_bar

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a block, without the hidden states


@dataclass(frozen=True)
class Chain:
    """A chain of blocks, each of which takes the hidden states that the previous one returned.

    Attributes:
        names: the names of the blocks, in order.
        hidden: for each batch, the input of the first block.
        calls: for each block and batch, the other arguments of the block.
    """

    names: tuple[str, ...]
    hidden: list[Tensor]
    calls: list[list[Call]]


def fit_in_order(
    model: nn.Module,
    pairs: list[tuple[Step, Site]],
    calibration: Calibration,
    swap: Swap,
    *,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> None:
    """Fit and replace the sites of `pairs`: first those outside the blocks, then block by block.

    The input moments of the sites of a block are measured again with the hidden states that the compressed
    blocks before it produce; the moments of the output gradients and the ranks are those of the dense model.
    Each block runs over the calibration batches twice, before and after it is compressed.

    The fits approximate the dense weights. Approximating the outputs of the dense model instead, through the
    cross-moment of the dense and the compressed inputs with a ridge of 1% of the mean moment, was much worse on
    SmolLM2-135M.

    Raises:
        CalibrationError: when there are no blocks, or they do not form a chain.

    Source: the order of fitting is that of Frantar and Alistarh, SparseGPT (2023), section 3.
    """
    assert calibration.batches is not None
    names = block_names(model, [site for _, site in pairs])
    inside = {name: [p for p in pairs if p[1].name.startswith(f"{name}.")] for name in names}
    outside = [p for p in pairs if not any(p in found for found in inside.values())]
    with (
        progress_bar("fit in order", len(pairs), progress) as bar,
        as_it_was(model, device, freeze=False),  # new layers copy requires_grad from the dense ones
        _undone_by_errors(swap),  # while the dense layers can still be moved with the model
        torch.no_grad(),
    ):
        fitted: Fitted = []
        for step, site in outside:
            bar.now(step.name)
            fitted.append((site, fit_step(step, site, calibration.metric(site.name))))
            bar.advance()
        swap.put(fitted)
        chain = trace(model, names, calibration.batches)
        hidden = chain.hidden
        for number, name in enumerate(names):
            block, calls = model.get_submodule(name), chain.calls[number]
            sites = [site for _, site in inside[name]]
            recorder = Recorder(sites, gradients=False)
            with recorder.attached():
                for x, call in zip(hidden, calls, strict=True):
                    _run(block, x, call)
            seen = recorder.metrics()
            fitted = []
            for step, site in inside[name]:
                bar.now(step.name)
                dense = calibration.metric(site.name)
                there = seen.get(site.name)
                metric = Metric(there.input, dense.output if dense else None) if there else dense
                fitted.append((site, fit_step(step, site, metric)))
                bar.advance()
            swap.put(fitted)
            block = model.get_submodule(name)
            hidden = [_run(block, x, call) for x, call in zip(hidden, calls, strict=True)]


@contextmanager
def _undone_by_errors(swap: Swap) -> Iterator[None]:
    try:
        yield
    except BaseException:
        swap.undo()
        raise


def block_names(model: nn.Module, sites: list[Site]) -> tuple[str, ...]:
    """Returns the names of the blocks: the children of the module list with most of the sites' parameters, in order.

    Raises:
        CalibrationError: when no `nn.ModuleList` or `nn.Sequential` contains a site.
    """
    best, most = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            prefix = f"{name}." if name else ""
            held = sum(site.params for site in sites if site.name.startswith(prefix))
            if held > most:  # the outermost of nested lists
                best, most = prefix, held
    if not most:
        raise CalibrationError(
            "sequential=True needs blocks in an nn.ModuleList or nn.Sequential that holds the layers to rewrite: "
            "this model has none; compress it without"
        )
    return tuple(f"{best}{child}" for child, _ in model.get_submodule(best.rstrip(".")).named_children())


class _StopError(Exception):
    """Raised before the last block runs, to skip the rest of the forward pass."""


def trace(model: nn.Module, names: tuple[str, ...], batches: list[Any]) -> Chain:
    """Run the batches once and record the inputs of the first block and the other arguments of every block.

    Raises:
        CalibrationError: when the first argument of a block is not the output of the previous one, or a block is not
            called once per batch.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in names]
    previous: list[Tensor | None] = [None]

    def enter(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise _broken(names[number], "does not take its hidden states as the first argument")
            if number == 0:
                hidden.append(args[0])
            elif args[0] is not previous[0]:
                raise _broken(names[number], f"does not take what {names[number - 1]} returned")
            calls[number].append((args[1:], kwargs))
            if number == len(names) - 1:
                raise _StopError

        return see

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        previous[0] = _hidden(output)

    handles = []
    runner = Runner(model, gradients=False)
    try:
        for number, name in enumerate(names):
            block = model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(enter(number), with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        with _without_cache(model):
            for batch in batches:
                try:
                    runner.forward(batch)
                except _StopError:
                    continue
                raise _broken(names[-1], "was not called")
    finally:
        for handle in handles:
            handle.remove()
    if any(len(found) != len(batches) for found in calls):
        raise _broken(names[0], "and the others are not each called once per batch")
    return Chain(names, hidden, calls)


def _broken(name: str, what: str) -> CalibrationError:
    return CalibrationError(f"sequential=True needs blocks that follow each other, but {name} {what}: compress without")


def _run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    return _hidden(block(hidden, *call[0], **call[1]))


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise CalibrationError(
            f"sequential=True needs blocks that return their hidden states, alone or first in a tuple, not a "
            f"{type(output).__name__}: compress without"
        )
    return hidden


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Disable the key-value cache that transformers models pass to their blocks: every rerun would extend it."""
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        if cached is not None:
            config.use_cache = False
        yield
    finally:
        if cached is not None:
            config.use_cache = cached
