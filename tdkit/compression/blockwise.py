"""Fit a model block by block, each with the inputs that the already compressed blocks produce."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.batches import unweighted
from tdkit.calibration.calibration import Calibration, shrunk
from tdkit.calibration.chains import (
    Blocks,
    Call,
    Names,
    blocks_of,
    finest_chain,
    hidden_states,
    in_order_of_calls,
    trace,
    within,
)
from tdkit.calibration.moments import Recorder
from tdkit.calibration.runner import Runner, as_it_was
from tdkit.compression.jobs import Job
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import CalibrationError
from tdkit.fitting.metric import Metric
from tdkit.models.sites import Site
from tdkit.models.swap import Resized, Swap
from tdkit.support.progress import progress_bar

_log = logging.getLogger(__name__)


def fit_in_order(
    model: nn.Module,
    jobs: Sequence[Job],
    calibration: Calibration,
    swap: Swap,
    *,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> None:
    """Fit and replace the sites of `jobs`: first those outside the blocks, then block by block.

    Blocks are the children of each outermost `nn.ModuleList` and `nn.Sequential`, or of the lists in these children if
    they follow each other. The lists are fitted in the order of their calls: the encoder before the decoder. The input
    moments of the sites of a block are measured again with the hidden states that the compressed blocks before it
    produce; its other arguments, the moments of the output gradients and the ranks are those of the model before.
    Each block runs over the calibration batches twice, before and after it is compressed.

    The largest list must be a chain of blocks. The sites of another list that is none are fitted with the moments of
    the dense model, like those outside the blocks; a warning is logged.

    The fits approximate the dense weights. Approximating the outputs of the dense model instead, through the
    cross-moment of the dense and the compressed inputs with a ridge of 1% of the mean moment, was much worse on
    SmolLM2-135M.

    Raises:
        CalibrationError: when there are no blocks, or those of the largest list do not form a chain.

    Source: the order of fitting is that of Frantar and Alistarh, SparseGPT (2023), section 3.
    """
    assert calibration.batches is not None
    batches = calibration.batches
    with (
        progress_bar("fit in order", len(jobs), progress) as bar,
        as_it_was(model, device, freeze=False),  # new layers copy requires_grad from the dense ones
        _undone_by_errors(swap),  # while the dense layers can still be moved with the model
        torch.no_grad(),
    ):

        def fit(chosen: Sequence[Job], seen: Mapping[str, Metric]) -> None:
            fitted: list[tuple[Site, FactorizedMatrix | Resized]] = []
            for job in chosen:
                bar.now(job.name)
                found = job.fit(lambda name: _with_input(calibration.fit_metric(name), seen.get(name)))
                fitted += zip(job.sites, found, strict=True)
                bar.advance()
            swap.put(fitted)

        chains = _chains(model, [site for job in jobs for site in job.sites], batches[0])
        covered = [name for names in chains for name in names]
        fit([job for job in jobs if not within(job.measured, covered)], {})
        for names in chains:
            chain = trace(model, names, batches)
            hidden = chain.hidden
            for name, calls in zip(names, chain.calls, strict=True):
                inside = [job for job in jobs if within(job.measured, [name])]
                if inside:
                    sites = [job.measured for job in inside]
                    fit(inside, _input_moments(model, name, sites, hidden, calls, batches))
                block = model.get_submodule(name)
                hidden = [_run(block, x, call) for x, call in zip(hidden, calls, strict=True)]


def _chains(model: nn.Module, sites: list[Site], batch: Any) -> list[Names]:
    """Returns the names of the blocks of each list that is a chain, in the order of their calls."""
    found = blocks_of(model, sites)
    chains = {id(blocks): _chain(model, blocks, batch, required=blocks is found[0]) for blocks in found}
    return [names for blocks in in_order_of_calls(model, found, batch) if (names := chains[id(blocks)])]


def _chain(model: nn.Module, blocks: Blocks, batch: Any, *, required: bool) -> Names:
    try:
        return finest_chain(model, blocks, batch)
    except CalibrationError as error:
        if required:
            raise
        _log.warning("%s, ... are fitted with the inputs of the dense model: %s", blocks.choices[-1][0], error)
        return ()


def _input_moments(
    model: nn.Module, name: str, sites: list[Site], hidden: Sequence[Tensor], calls: Sequence[Call], batches: list[Any]
) -> dict[str, Metric]:
    """Returns the metrics of `sites`, of their inputs only, when the block `name` runs on its hidden states."""
    runner, recorder = Runner(model, gradients=False), Recorder(sites, gradients=False)
    block = model.get_submodule(name)
    with recorder.attached():
        for batch, x, call in zip(batches, hidden, calls, strict=True):
            recorder.begin_batch(runner.mask(batch), unweighted(batch)[1])
            _run(block, x.clone(), call)  # a block may change its input in place
    counts = recorder.rows()
    return {name: shrunk(metric, counts.get(name, 0.0)) for name, metric in recorder.metrics().items()}


def _with_input(dense: Metric | None, seen: Metric | None) -> Metric | None:
    """Returns the metric of the inputs `seen` and the output gradients of the dense model."""
    return Metric(seen.input, dense.output if dense else None) if seen else dense


def _run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    return hidden_states(block(hidden, *call[0], **call[1]))


@contextmanager
def _undone_by_errors(swap: Swap) -> Iterator[None]:
    try:
        yield
    except BaseException:
        swap.undo()
        raise
