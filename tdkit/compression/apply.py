"""Fit the factors a plan asks for and put them in the model: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from tdkit.calibration.calibration import Batch, Calibration
from tdkit.calibration.measure import recalibrate
from tdkit.compression.blockwise import fit_in_order
from tdkit.compression.fit import fit_step
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import CalibrationError, OptionError, PolicyError
from tdkit.models.sites import Site
from tdkit.models.swap import Swap, swapping
from tdkit.planning.plan import Plan
from tdkit.planning.planner import calibrated, planned
from tdkit.planning.policy import Policy
from tdkit.planning.resolution import Resolved, resolve
from tdkit.planning.step import Step
from tdkit.support.devices import check_device
from tdkit.support.processes import failing_together, processes, shared
from tdkit.support.progress import progress_bar


def compress(
    model: nn.Module,
    policy: Policy | Plan,
    *,
    calibration: Calibration | Iterable[Batch] | str | Path | None = None,
    sequential: bool = False,
    passes: int = 1,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Replace the weights that `policy` selects by factors, in place, and return the same model.

    All or nothing: an exception, Ctrl-C included, leaves the model exactly as it was. The same model,
    policy and calibration give the same factors. Layers are fitted and replaced one after the other, and the
    weights of a large model are spilled to disk meanwhile, so that memory does not grow. Processes that
    ``torch.distributed`` started together share the fits, a layer each, and all end with the same model.

    Args:
        model: any torch module.
        policy: a policy, or a plan made from one.
        calibration: what `calibrate` returned, or the batches it takes. Layers are then fitted in the
            metric of their inputs and output gradients instead of the Frobenius norm.
        sequential: fit block by block with the inputs that the blocks before, already compressed, produce.
            It needs the calibration's batches and a model whose blocks follow each other in one list.
        passes: how often to fit. Each pass after the first measures the moments of the compressed model on the
            calibration's batches and fits the dense weights again in the mean of these and the dense model's,
            with sizes planned anew unless a plan was given: where much is removed, the dense model's moments
            alone no longer say what matters.
        device: where to fit; the weight's own device when None. Factors end on the weight's device.
        progress: show a progress bar; on a terminal only when None.

    Raises:
        PolicyError, OptionError, BudgetError, CalibrationError: as `plan` and `calibrate`, before any work.
    """
    _check_options(calibration, sequential, passes)
    resolved = resolve(model, policy)
    _check_weights(resolved)
    check_device(device)
    known = calibrated(resolved, calibration, progress=progress)
    return compress_resolved(resolved, known, sequential=sequential, passes=passes, device=device, progress=progress)


def compress_resolved(
    resolved: Resolved,
    calibration: Calibration | None = None,
    *,
    sequential: bool = False,
    passes: int = 1,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """`compress` for a model and policy that were resolved already."""
    _check_options(calibration, sequential, passes)
    _check_weights(resolved)
    device = check_device(device)
    model, known = resolved.model, calibration
    for number in range(passes):
        pairs = resolved.pairs(planned(resolved, known, progress=progress))
        with failing_together(), swapping(model, [site for _, site in pairs]) as swap:
            if sequential:
                assert known is not None
                fit_in_order(model, pairs, known, swap, device=device, progress=progress)
            else:
                _fit_all(pairs, known, swap, device, progress)
            if number + 1 < passes:
                assert calibration is not None
                sites = [site for site in resolved.survey.sites if site.name in calibration.names]
                known = recalibrate(model, sites, calibration, device=device, progress=progress)
                swap.undo()
    return model


def _check_options(calibration: object, sequential: bool, passes: int) -> None:
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise OptionError(f"compress: passes={passes!r} must be an integer of at least 1")
    lacking = calibration is None or (isinstance(calibration, Calibration) and calibration.batches is None)
    for what, asked in (("sequential=True", sequential), (f"passes={passes}", passes > 1)):
        if asked and lacking:
            raise CalibrationError(f"{what} runs the calibration batches again: give calibration= with its batches")


def _check_weights(resolved: Resolved) -> None:
    """Refuse weights that cannot be fitted, before any work.

    Raises:
        PolicyError: naming the layers.
    """
    meta = [site.name for site in resolved.rewritten if site.weight.is_meta]
    if meta:
        raise PolicyError(
            f"the weights of {', '.join(meta[:3])} are on the meta device and hold no numbers: load the model, then "
            "compress it (a plan needs no weights)"
        )


def _fit_all(
    pairs: list[tuple[Step, Site]],
    calibration: Calibration | None,
    swap: Swap,
    device: torch.device | str | None,
    progress: bool | None,
) -> None:
    """Fit one layer after the other, each by one of the processes that run together, and put it in its place."""

    def fit(pair: tuple[Step, Site]) -> FactorizedMatrix:
        step, site = pair
        bar.now(step.name)
        matrix = fit_step(step, site, calibration.metric(site.name) if calibration else None, device)
        return matrix.cpu() if together else matrix

    together = processes()[1] > 1
    with progress_bar("fit", len(pairs), progress) as bar:
        for (_, site), matrix in zip(pairs, shared(pairs, fit), strict=True):
            swap.put([(site, matrix.to(site.weight.device))])
            bar.advance()
