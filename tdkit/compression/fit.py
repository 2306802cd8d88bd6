"""Fit the factors for one step of a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import OptionError, told_as
from tdkit.fitting.metric import Metric
from tdkit.models.sites import Site
from tdkit.planning.step import Step
from tdkit.shapes import by
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
        CalibrationError: when the metric is that of a weight of another shape.
        OptionError: when the decomposition does not return finite factors of the shape of the weight.
    """
    kind = step.decomposition
    assert kind is not None
    weight = kind.view(site.finite_weight())
    if metric is not None:
        metric.check(site.name, site.shape)
    at = weight if device is None else weight.to(device)
    there = None if metric is None else Metric(_to(metric.input, at.device), _to(metric.output, at.device))
    place = f"{site.name}: the decomposition {kind.name} ({type(kind).__module__}) failed"
    with threads_for(at.numel()), told_as(OptionError, place, but=(MemoryError,)):
        matrix = kind.fit(at.clone(), there)  # the model's own weight is not handed over
        fault = _fault(matrix, at)
        if fault is not None:
            raise OptionError(f"{place}: {fault}")
        matrix.error = kind.error(at, matrix, there)
    return matrix.to(weight.device)


def _fault(matrix: object, weight: Tensor) -> str | None:
    """Returns what is wrong with the result of a fit, or None."""
    if not isinstance(matrix, FactorizedMatrix):
        return f"fit returned a {type(matrix).__name__}, which is no FactorizedMatrix"
    if tuple(matrix.sizes) != tuple(weight.shape):
        return f"fit returned factors of {by(matrix.sizes)} for a weight of {by(tuple(weight.shape))}"
    lost = [name for name, factor in matrix.named_parameters() if not bool(torch.isfinite(factor).all())]
    if lost:
        return f"fit returned NaN or infinite numbers in {', '.join(lost)}: keep this layer, or choose another rank"
    return None


def _to(moment: Tensor | None, device: torch.device) -> Tensor | None:
    return None if moment is None else moment.to(device)
