"""Fit the factors of a plan and replace the layers of the model: all of them, or none."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from tdkit.calibration.batches import Batch
from tdkit.calibration.calibration import Calibration, Loss
from tdkit.calibration.measure import recalibrate
from tdkit.compression.blockwise import fit_in_order
from tdkit.compression.jobs import Job, ShrinkJob, jobs_of
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import CalibrationError, OptionError, PolicyError
from tdkit.models.quantization import quantize_within
from tdkit.models.registration import attach
from tdkit.models.sites import Site
from tdkit.models.small_heads import use_small_heads
from tdkit.models.swap import Resized, Swap, swapping
from tdkit.models.widths import follow_widths
from tdkit.planning.budget import FLOATS, INTEGERS, Budget
from tdkit.planning.grouping import shrunk_groups, tested
from tdkit.planning.plan import Plan
from tdkit.planning.planner import calibrated, planned
from tdkit.planning.policy import Policy
from tdkit.planning.resolution import Resolved, resolve
from tdkit.planning.step import Step
from tdkit.support.devices import check_device
from tdkit.support.processes import failing_together, is_main_process, processes, shared
from tdkit.support.progress import progress_bar

_log = logging.getLogger(__name__)


def compress(
    model: nn.Module,
    policy: Policy | Plan,
    *,
    calibration: Calibration | Iterable[Batch] | str | Path | None = None,
    loss: Loss | None = None,
    sequential: bool = False,
    passes: int = 1,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Replace the weights that `policy` selects by factors, in place, and return the same model.

    An exception, Ctrl-C included, restores the original model. The same model, policy and calibration give the same
    factors. Layers are fitted and replaced one by one, and the replaced weights of a large model are spilled to disk
    until the end, so that memory does not grow. The processes of a ``torch.distributed`` group distribute the layers
    among them, and all end with the same model. The warnings of the plan are logged.

    Args:
        model: any torch module.
        policy: a policy, or a plan made from one.
        calibration: a result of `calibrate`, or batches or the name of a text to calibrate on. Layers are then fitted
            in the metric of their inputs and output gradients instead of the Frobenius norm.
        loss: a function (model output, batch) -> scalar tensor for the batches; see `calibrate`.
        sequential: fit block by block, each with the inputs that the already compressed blocks before it produce.
            Requires the batches of the calibration and a model whose blocks form one chain.
        passes: the number of fits. Each pass after the first measures the moments of the compressed model on the
            calibration batches, and refits the dense weights in the mean of these and the dense model's moments. The
            sizes are planned again, unless a plan was given. This helps when many parameters are removed and the
            moments of the dense model alone describe the compressed one poorly.
        device: the device to calibrate and fit on. The model is moved there to calibrate, and back; the factors are
            moved to the weight's device. When None, the model is not moved, nor one with layers that hooks of
            accelerate load when they are called.
        progress: show a progress bar; when None, only on a terminal.

    Returns:
        `model`, whose selected layers are factorised.

    Raises:
        PolicyError, OptionError, BudgetError, CalibrationError: as in `plan` and `calibrate`.
    """
    _check_options(calibration, sequential, passes)
    resolved = resolve(model, policy)
    _check_weights(resolved)
    check_device(device)
    if resolved.plan is not None:
        _log_warnings(resolved.plan)
    known = calibrated(resolved, calibration, loss=loss, device=device, progress=progress)
    compress_resolved(resolved, known, sequential=sequential, passes=passes, device=device, progress=progress)
    return model


def compress_resolved(
    resolved: Resolved,
    calibration: Calibration | None = None,
    *,
    sequential: bool = False,
    passes: int = 1,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Like `compress`, for an already resolved model and policy, and a calibration; returns the model.

    The warnings of a plan that it makes are logged, those of a given plan are not.
    """
    _check_options(calibration, sequential, passes)
    _check_weights(resolved)
    device = check_device(device)
    model, known = resolved.model, calibration
    if resolved.plan is not None:
        _check_groups(resolved.pairs(resolved.plan), calibration)
    jobs: list[Job] = []
    for number in range(passes):
        made = planned(resolved, known, progress=progress)
        if resolved.plan is None and number + 1 == passes:
            _log_warnings(made)
        last = number + 1 == passes
        known_order = None if sequential or known is None else known.elimination
        jobs = jobs_of(resolved.pairs(made), elimination=known_order, keep_size=not last)
        with failing_together(), swapping(model, [site for job in jobs for site in job.sites]) as swap:
            if sequential:
                assert known is not None
                fit_in_order(model, jobs, known, swap, device=device, progress=progress)
            else:
                _fit_all(jobs, known, swap, device, progress)
            if last:
                _follow_widths(model, jobs)
                _cast(swap, made.target)
                attach(model)
                use_small_heads(model)
            else:
                assert calibration is not None
                sites = [site for site in resolved.survey.sites if site.name in calibration.names]
                known = recalibrate(model, sites, calibration, device=device, progress=progress)
                swap.undo()
    return model


def _follow_widths(model: nn.Module, jobs: Sequence[Job]) -> None:
    """Write the width of shrunk groups that are all alike into the config of a transformers model."""
    shrunk = [job for job in jobs if isinstance(job, ShrinkJob) and not job.group.keeps_sizes]
    for width in dict.fromkeys(job.group.units for job in shrunk):
        alike = [job for job in shrunk if job.group.units == width]
        units = {job.kind.units for job in alike}
        if len(units) == 1:
            follow_widths(model, [job.group for job in alike], alike[0].kind.units or 0)


def _log_warnings(plan: Plan) -> None:
    if is_main_process():
        for text in plan.warnings:
            _log.warning("%s", text)


def _check_options(calibration: object, sequential: bool, passes: int) -> None:
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise OptionError(f"compress: passes={passes!r} must be an integer of at least 1")
    lacking = calibration is None or (isinstance(calibration, Calibration) and calibration.batches is None)
    for what, asked in (("sequential=True", sequential), (f"passes={passes}", passes > 1)):
        if asked and lacking:
            raise CalibrationError(f"{what} runs the calibration batches again: give calibration= with its batches")


def _cast(swap: Swap, target: Budget | None) -> None:
    """Give the model the dtype that the budget asks for."""
    if target is not None and target.dtype in INTEGERS:
        quantize_within(swap, INTEGERS[target.dtype])
    elif target is not None and target.dtype is not None:
        swap.keep_numbers()
        swap.model.to(FLOATS[target.dtype])


def _check_weights(resolved: Resolved) -> None:
    """Check that the weights can be fitted.

    Raises:
        PolicyError: when weights are on the meta device; the message names the layers.
    """
    meta = [site.name for site in resolved.rewritten if site.weight.is_meta]
    if meta:
        raise PolicyError(
            f"the weights of {', '.join(meta[:3])} are on the meta device and hold no numbers: load the model, then "
            "compress it (a plan needs no weights)"
        )


def _check_groups(pairs: Sequence[tuple[Step, Site]], calibration: Calibration | None) -> None:
    """Check that the groups which a given plan shrinks can be.

    Raises:
        PolicyError: when other layers depend on their units.
        CalibrationError: when there are no calibration batches to test it on.
    """
    faults = tested([group for group, _ in shrunk_groups(pairs)], calibration)
    if faults:
        raise PolicyError("the plan cannot be carried out: " + "; ".join(f"{n}: {why}" for n, why in faults.items()))


def _fit_all(
    jobs: list[Job],
    calibration: Calibration | None,
    swap: Swap,
    device: torch.device | str | None,
    progress: bool | None,
) -> None:
    """Fit the layers, distributed over the processes of the group, and replace each once it is fitted."""

    def fit(job: Job) -> list[FactorizedMatrix | Resized]:
        bar.now(job.name)
        fitted = job.fit(calibration.fit_metric if calibration else lambda _: None, device)
        return [each.cpu() for each in fitted] if together else fitted

    together = processes()[1] > 1
    before = after = 0
    with progress_bar("fit", len(jobs), progress, work=sum(_size(job) for job in jobs)) as bar:
        for job, fitted in zip(jobs, shared(jobs, fit), strict=True):
            size = _size(job)
            before, after = before + size, after + sum(each.params for each in fitted)
            swap.put([(site, each.to(site.weight.device)) for site, each in zip(job.sites, fitted, strict=True)])
            bar.so_far(f"{before:,} -> {after:,} params")
            bar.advance(work=size)


def _size(job: Job) -> int:
    return sum(site.params for site in job.sites)
