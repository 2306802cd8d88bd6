"""Fit the factors a plan asks for and put them in the model: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from tdkit.calibration import Batch, Calibration, recalibrate
from tdkit.errors import CalibrationError, OptionError, PolicyError
from tdkit.fitting import Fitted, fit_step, swapping
from tdkit.plan import Plan, Step
from tdkit.planning import calibrated, plan
from tdkit.policy import Policy
from tdkit.progress import progress_bar
from tdkit.sequential import fit_in_order
from tdkit.sites import Site, survey


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
    policy and calibration give the same factors.

    Args:
        model: any torch module.
        policy: a policy, or a plan made from one.
        calibration: what `calibrate` returned, or the batches it takes. Layers are then fitted in the
            metric of their inputs and output gradients instead of the Frobenius norm.
        sequential: fit block by block with the inputs that the blocks before, already compressed, produce.
            It needs the calibration's batches and a model whose blocks follow each other in one list.
        passes: how often to fit. Each pass after the first measures the moments of the compressed model on the
            calibration's batches and fits the dense weights again in them, with sizes planned anew unless a
            plan was given: where much is removed, the dense model's moments no longer say what matters.
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
    for number in range(passes):
        chosen = policy if isinstance(policy, Plan) else plan(model, policy, calibration=known, progress=progress)
        pairs = _sites_of(model, chosen)
        measured = [site for site in survey(model).sites if known is not None and site.name in known.names]
        with swapping(model) as swap:
            if sequential:
                assert known is not None
                fit_in_order(model, pairs, known, swap, device=device, progress=progress)
            else:
                swap.put(_fit_all(pairs, known, device, progress))
            if number + 1 < passes:
                assert known is not None
                known = recalibrate(model, measured, known, device=device, progress=progress)
                swap.undo()
    return model


def _fit_all(
    pairs: list[tuple[Step, Site]],
    calibration: Calibration | None,
    device: torch.device | str | None,
    progress: bool | None,
) -> Fitted:
    fitted: Fitted = []
    with progress_bar("fit", len(pairs), progress) as bar:
        for step, site in pairs:
            bar.now(step.name)
            metric = calibration.metric(site.name) if calibration else None
            fitted.append((site, fit_step(step, site, metric, device)))
            bar.advance()
    return fitted


def _sites_of(model: nn.Module, chosen: Plan) -> list[tuple[Step, Site]]:
    by_name = {site.name: site for site in survey(model).sites}
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
