"""Fit the factors for one step of a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import PolicyError
from tdkit.fitting.metric import Metric
from tdkit.models.sites import Site
from tdkit.planning.step import Step
from tdkit.support.threads import threads_for


def fit_step(
    step: Step, site: Site, metric: Metric | None = None, device: torch.device | str | None = None
) -> FactorizedMatrix:
    """Returns the fitted factors of `step` on the device of the weight, with their relative `error` set.

    Args:
        metric: the calibrated moments of the site; fits in the Frobenius norm when None.
        device: the device to fit on; that of the weight when None.

    Raises:
        PolicyError: when the weight has NaN or infinite entries.
    """
    assert step.decomposition is not None
    weight = step.decomposition.view(site.weight.detach())
    if not bool(torch.isfinite(weight).all()):
        raise PolicyError(f"{site.name} holds NaN or infinite weights: repair it, or keep it with a rule")
    at = weight if device is None else weight.to(device)
    there = None if metric is None else Metric(_to(metric.input, at.device), _to(metric.output, at.device))
    with threads_for(at.numel()):
        matrix = step.decomposition.fit(at, there)
        matrix.error = step.decomposition.error(at, matrix, there)
    return matrix.to(weight.device)


def _to(moment: Tensor | None, device: torch.device) -> Tensor | None:
    return None if moment is None else moment.to(device)
