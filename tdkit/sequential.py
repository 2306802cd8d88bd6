"""Fit a model block by block, each with the inputs that the compressed blocks before it produce."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration import Calibration, Runner, as_it_was
from tdkit.errors import CalibrationError
from tdkit.fitting import Fitted, Swap, fit_step
from tdkit.metric import Metric
from tdkit.moments import UNDERSTOOD, same_tensor, token_rows
from tdkit.plan import Step
from tdkit.progress import progress_bar
from tdkit.sites import Site

TARGET_RIDGE = 1e-2  # of the mean moment: how far a target may leave the weight for what few tokens say

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a block, without the hidden states


Products = tuple[Tensor, Tensor, int]


@dataclass(frozen=True)
class Chain:
    """Blocks that follow each other: each takes the hidden states that the one before returned.

    Attributes:
        names: of the blocks, in order.
        hidden: what enters the first block, per batch; then the next, as the chain is followed.
        calls: what else each block is called with: by block, per batch.
        masks: which tokens are no padding, (batch, length); None where there is none.
    """

    names: tuple[str, ...]
    hidden: list[Tensor]
    calls: list[list[Call]]
    masks: list[Tensor | None]


def fit_in_order(
    model: nn.Module,
    pairs: list[tuple[Step, Site]],
    calibration: Calibration,
    swap: Swap,
    *,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> None:
    """Fit and replace the sites of `pairs`: those outside the blocks first, then block after block.

    A layer that gets x from the compressed prefix, and would get z in the dense model, is fitted to give
    W z rather than W x, so that it also makes up for what the layers before it lost: in the moment
    E[x x^T], with the weight W E[z x^T] E[x x^T]^-1 as target. The moments of the output gradients and
    the ranks stay those of the dense model. That takes two passes of each block over the calibration
    batches more than running them once, whatever the number of its layers.

    Raises:
        CalibrationError: when the blocks cannot be found or do not follow each other.

    Sources: the order of fitting, Frantar and Alistarh, SparseGPT (2023), section 3; targets of the dense
    model, Li et al., GPTAQ (2025), section 3.
    """
    assert calibration.batches is not None
    names = block_names(model, [site for _, site in pairs])
    inside = {name: [p for p in pairs if p[1].name.startswith(f"{name}.")] for name in names}
    outside = [p for p in pairs if not any(p in found for found in inside.values())]
    with progress_bar("fit in order", len(pairs), progress) as bar, as_it_was(model, device), torch.no_grad():
        dense = trace(model, names, calibration.batches)
        fitted: Fitted = []
        for step, site in outside:
            bar.now(step.name)
            fitted.append((site, fit_step(step, site, calibration.metric(site.name))))
            bar.advance()
        swap.put(fitted)
        chain = trace(model, names, calibration.batches) if outside else dense
        for number, name in enumerate(names):
            block = model.get_submodule(name)
            seen = _follow(block, [site for _, site in inside[name]], dense, chain, number)
            fitted = []
            for step, site in inside[name]:
                bar.now(step.name)
                known = calibration.metric(site.name)
                moments = seen.get(site.name)
                if moments is None:
                    matrix = fit_step(step, site, known)
                else:
                    metric = Metric(moments.mean(), known.output if known else None)
                    matrix = fit_step(step, site, metric, weight=moments.target(site.weight))
                fitted.append((site, matrix))
                bar.advance()
            swap.put(fitted)
            chain.hidden[:] = _through(model.get_submodule(name), chain, number)


class Moments:
    """E[x x^T] and E[(z - x) x^T] of a layer's inputs: x after the compressed prefix, z in the dense model."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.own = torch.zeros(size, size, dtype=torch.float64)
        self.gap = torch.zeros(size, size, dtype=torch.float64)
        self.count = 0

    def add(self, products: Products) -> None:
        """Add one batch."""
        own, gap, count = products
        self.own += own
        self.gap += gap
        self.count += count

    def mean(self) -> Tensor:
        """E[x x^T]."""
        return self.own / self.count

    def target(self, weight: Tensor) -> Tensor:
        """W + W E[(z - x) x^T] (E[x x^T] + ridge)^-1, float64: what gives W z from x, drawn towards W."""
        own = self.mean()
        own.diagonal().add_(float(own.diagonal().mean()) * TARGET_RIDGE + torch.finfo(own.dtype).tiny)
        correction: Tensor = torch.linalg.solve(own, (self.gap / self.count).T).T
        weight = weight.detach().double()
        return weight + weight @ correction.to(weight.device)


def products(
    x: Tensor,  # (tokens, n)
    z: Tensor,  # (tokens, n)
) -> Products:
    """x^T x and (z - x)^T x, multiplied in float32 (float64 for float64 rows), and the number of tokens."""
    if x.dtype != torch.float64:
        x, z = x.float(), z.float()
    return (x.T @ x).double().cpu(), ((z - x).T @ x).double().cpu(), len(x)


def _follow(block: nn.Module, sites: list[Site], dense: Chain, chain: Chain, number: int) -> dict[str, Moments]:
    """The moments of a block's sites over all batches; the dense chain goes on behind the block."""
    moments: dict[str, Moments] = {}
    for batch, (x, z) in enumerate(zip(chain.hidden, dense.hidden, strict=True)):
        with _inputs(sites) as ahead:
            _run(block, x, chain.calls[number][batch])
        with _inputs(sites) as behind:
            behind_block = _run(block, z, dense.calls[number][batch])
        dense.hidden[batch] = behind_block
        shared: tuple[Tensor, Products] | None = None  # layers one after another often share their input
        for site in sites:
            if len(ahead[site.name]) != 1 or len(behind[site.name]) != 1:
                continue  # not called, or more than once: the calibration's metric stands
            own, other = ahead[site.name][0], behind[site.name][0]
            if shared is None or not same_tensor(shared[0], own):
                shared = own, products(token_rows(own, chain.masks[batch]), token_rows(other, chain.masks[batch]))
            moments.setdefault(site.name, Moments(site.shape[1])).add(shared[1])
    return moments


@contextmanager
def _inputs(sites: list[Site]) -> Iterator[dict[str, list[Tensor]]]:
    """What enters each site's layer, while the model runs in this block."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _, args, __: found[name].append(args[0].detach())

    handles = [
        user.module.register_forward_hook(watch(site.name))
        for site in sites
        for user in site.users
        if user.host.name in UNDERSTOOD and user.host.multiplies()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _through(block: nn.Module, chain: Chain, number: int) -> list[Tensor]:
    return [_run(block, x, call) for x, call in zip(chain.hidden, chain.calls[number], strict=True)]


def block_names(model: nn.Module, sites: list[Site]) -> tuple[str, ...]:
    """The children of the list of modules that holds most of the sites' parameters, in order."""
    best, most = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            prefix = f"{name}." if name else ""
            held = sum(site.params for site in sites if site.name.startswith(prefix))
            if held > most:  # of nested lists, the outermost
                best, most = prefix, held
    if not most:
        raise CalibrationError(
            "sequential=True needs blocks in an nn.ModuleList or nn.Sequential that holds the layers to rewrite: "
            "this model has none; compress it without"
        )
    return tuple(f"{best}{child}" for child, _ in model.get_submodule(best.rstrip(".")).named_children())


class _StopError(Exception):
    """Raised in front of the last block: what follows it is not needed."""


def trace(model: nn.Module, names: tuple[str, ...], batches: list[Any]) -> Chain:
    """Run the batches once and keep what the first block gets, and the other arguments of every block.

    Raises:
        CalibrationError: when a block does not take what the one before returned as its first argument.
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
    runner = Runner(model, None, gradients=False)
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
    return Chain(names, hidden, calls, [runner.mask(batch) for batch in batches])


def _broken(name: str, what: str) -> CalibrationError:
    return CalibrationError(f"sequential=True needs blocks that follow each other, but {name} {what}: compress without")


def _run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    return _hidden(block(hidden, *call[0], **call[1]))


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, Tensor)
    return hidden


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """transformers models hand a growing cache to their blocks unless told not to."""
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        if cached is not None:
            config.use_cache = False
        yield
    finally:
        if cached is not None:
            config.use_cache = cached
