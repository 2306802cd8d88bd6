"""Fit the factors that one step of a plan asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import PolicyError
from tdkit.fitting.metric import Metric
from tdkit.models.sites import Site
from tdkit.planning.step import Step


def fit_step(
    step: Step, site: Site, metric: Metric | None = None, device: torch.device | str | None = None
) -> FactorizedMatrix:
    """The factors that `step` asks for, with their relative error, on the weight's own device.

    Args:
        metric: calibrated moments; the Frobenius norm when None.
        device: where to fit; the weight's own when None.

    Raises:
        PolicyError: when the weight is not finite.
    """
    assert step.decomposition is not None
    weight = site.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise PolicyError(f"{site.name} holds NaN or infinite weights: repair it, or keep it with a rule")
    at = weight if device is None else weight.to(device)
    there = None if metric is None else Metric(_to(metric.input, at.device), _to(metric.output, at.device))
    matrix = step.decomposition.fit(at, there)
    matrix.error = step.decomposition.error(at, matrix, there)
    return matrix.to(weight.device)


def _to(moment: Tensor | None, device: torch.device) -> Tensor | None:
    return None if moment is None else moment.to(device)
