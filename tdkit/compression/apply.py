"""Fit the factors a plan asks for and put them in the model: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from tdkit.calibration.calibration import Batch, Calibration
from tdkit.calibration.measure import recalibrate
from tdkit.compression.blockwise import fit_in_order
from tdkit.compression.fit import fit_step
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import CalibrationError, OptionError, PolicyError
from tdkit.models.sites import Site, survey
from tdkit.models.swap import Swap, swapping
from tdkit.planning.plan import Plan, Step
from tdkit.planning.planner import calibrated, plan
from tdkit.planning.policy import Policy
from tdkit.support.processes import processes, shared
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
    weights of a large model wait on disk meanwhile, so that memory does not grow. Processes that
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
    if passes < 1:
        raise OptionError(f"compress: passes={passes} must be at least 1")
    known = calibrated(model, policy, calibration, progress=progress)
    for what, asked in (("sequential=True", sequential), (f"passes={passes}", passes > 1)):
        if asked and (known is None or known.batches is None):
            raise CalibrationError(f"{what} runs the calibration batches again: give calibration= with its batches")
    dense = known
    for number in range(passes):
        chosen = policy if isinstance(policy, Plan) else plan(model, policy, calibration=known, progress=progress)
        sites = survey(model).sites
        pairs = _pairs(sites, chosen)
        with swapping(model, [site for _, site in pairs]) as swap:
            if sequential:
                assert known is not None
                fit_in_order(model, pairs, known, swap, device=device, progress=progress)
            else:
                _fit_all(pairs, known, swap, device, progress)
            if number + 1 < passes:
                assert dense is not None
                measured = [site for site in sites if site.name in dense.names]
                known = recalibrate(model, measured, dense, device=device, progress=progress)
                swap.undo()
    return model


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


def _pairs(sites: Sequence[Site], chosen: Plan) -> list[tuple[Step, Site]]:
    """The steps that rewrite something, each with its site."""
    by_name = {site.name: site for site in sites}
    pairs = []
    for step in chosen.rewritten:
        site = by_name.get(step.name)
        if site is None or site.names != step.names or site.shape != step.shape:
            raise PolicyError(
                f"the plan's layer {step.name} ({step.shape[0]}x{step.shape[1]}) is not in this model: "
                "plan again for this model"
            )
        pairs.append((step, site))
    return pairs
