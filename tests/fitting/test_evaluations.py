"""How often the calibrated fits evaluate their objective, which is what they take their time for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tdkit import Kronecker, Metric, TTMatrix
from tdkit.fitting import lbfgs, train_in_metric, variable_projection
from tests.benchmarks.fits import random_moment, random_weight

SHAPE = (96, 64)
CURVE = 75  # evaluations for the six fits of an error curve
FIT = 50  # for a fit, from the better of two starting points; 43 measured


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The evaluations of each minimisation so far."""
    found: list[int] = []

    def minimise(*args: Any, **options: Any) -> lbfgs.Minimum:
        minimum = lbfgs.minimise(*args, **options)
        found.append(minimum.evaluations)
        return minimum

    monkeypatch.setattr(variable_projection, "minimise", minimise)
    monkeypatch.setattr(train_in_metric, "minimise", minimise)
    return found


def problem() -> tuple[Tensor, Metric]:
    return random_weight(SHAPE, 0), Metric(random_moment(SHAPE[1], 1), random_moment(SHAPE[0], 2))


def test_a_curve_and_a_fit_take_few_evaluations(evaluations: list[int]) -> None:
    weight, metric = problem()
    Kronecker().curve(weight, metric)
    assert 6 <= len(evaluations) <= 7
    assert sum(evaluations) <= CURVE
    evaluations.clear()
    choice = Kronecker().complete(SHAPE, weight.numel() // 2)
    assert choice is not None
    choice.fit(weight, metric)
    assert len(evaluations) == 3
    assert sum(evaluations) <= FIT


def test_decompositions_of_one_form_share_the_fits_of_their_curves(evaluations: list[int]) -> None:
    """With even rows a wide train is a Kronecker sum, and one core of four numbers more."""
    weight, metric = problem()
    kronecker = {point.decomposition.terms: point for point in Kronecker().curve(weight, metric)}  # type: ignore[attr-defined]
    before = len(evaluations)
    train = {point.decomposition.ranks: point for point in TTMatrix().curve(weight, metric)}  # type: ignore[attr-defined]
    assert len(evaluations) - before <= 1
    both = [rank for rank in train if rank in kronecker and rank > 1]
    assert len(both) > 10
    assert all(train[rank].params == kronecker[rank].params + 4 for rank in both)


def test_what_is_shared_is_the_same_weight_in_the_same_metric(evaluations: list[int]) -> None:
    weight, metric = problem()
    first = [point.error for point in Kronecker().curve(weight, metric)]
    count = len(evaluations)
    assert [point.error for point in Kronecker().curve(weight.clone(), metric)] == first
    assert len(evaluations) == count
    weight.data.mul_(2)  # leaves no trace in the version counter
    assert [point.error for point in Kronecker().curve(weight, metric)] == pytest.approx([4 * e for e in first])
    again = [point.error for point in Kronecker().curve(weight, Metric(metric.input, None))]
    assert again != pytest.approx([4 * e for e in first], rel=1e-2)


@pytest.mark.parametrize("pairs", [1, 3, 4, 5, 8, 11])
def test_the_direction_is_that_of_the_two_loop_recursion(pairs: int) -> None:
    """Nocedal and Wright (2006), algorithm 7.4, on a window of four pairs."""
    draw = torch.Generator().manual_seed(0)
    curvature = torch.logspace(0, 2, 12, dtype=torch.float64)
    memory, kept = lbfgs._Memory(curvature, 4), []
    for _ in range(pairs):
        step = torch.randn(12, generator=draw, dtype=torch.float64)
        memory.add(step, -step)  # negative curvature: left out
        memory.add(step, curvature * step)
        kept.append((step, curvature * step))
    gradient = torch.randn(12, generator=draw, dtype=torch.float64)
    expected, weights = -gradient, []
    for step, change in reversed(kept[-4:]):
        weights.append(float(step @ expected) / float(step @ change))
        expected = expected - weights[-1] * change
    step, change = kept[-1]
    expected = expected * float(step @ change) / float(change @ change)
    for (step, change), weight in zip(kept[-4:], reversed(weights), strict=True):
        expected = expected + step * (weight - float(change @ expected) / float(step @ change))
    assert torch.allclose(memory.direction(gradient), expected, rtol=1e-9, atol=1e-12)
