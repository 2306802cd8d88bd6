"""Tucker, CP and spatial low-rank fits: optima, exact cases, error curves and degenerate moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdkit import CanonicalPolyadic, Decomposition, Metric, SpatialLowRank, Tucker
from tdkit.errors import CalibrationError
from tdkit.fitting.canonical_polyadic import fit_cp
from tdkit.fitting.tucker import TuckerErrors, fit_tucker
from tests.fitting.moments import moment, random

SHAPE = (10, 8, 3, 3)
CHOICES: tuple[Decomposition, ...] = (Tucker(rank_out=5, rank_in=4), CanonicalPolyadic(rank=9), SpatialLowRank(rank=6))
KINDS = pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)


def metric_for(shape: tuple[int, ...]) -> Metric:
    columns = random(*shape[1:]).numel()
    return Metric(moment(columns, 1), moment(shape[0], 2))


def adam(choice: Decomposition, weight: Tensor, metric: Metric, seed: int, steps: int = 500) -> float:
    """The error after a plain gradient descent over all factors from random ones."""
    matrix = choice.empty(tuple(weight.shape), dtype=torch.float64)
    with torch.no_grad():
        for k, parameter in enumerate(matrix.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed + k) * 0.5)
    optimizer = torch.optim.Adam(matrix.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    c, s = metric.ridged_input(), metric.ridged_output()
    assert c is not None
    assert s is not None
    for _ in range(steps):
        gap = weight.flatten(1) - matrix.dense()
        loss = (gap * (s @ gap @ c)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return metric.squared_error(weight.flatten(1) - matrix.dense())


@KINDS
def test_no_descent_over_all_factors_ends_clearly_below_the_fit(choice: Decomposition) -> None:
    shape = (6, 5, 3, 2)
    small = {"tucker": Tucker(rank_out=3, rank_in=2), "cp": CanonicalPolyadic(rank=4)}.get(
        choice.name, SpatialLowRank(rank=3)
    )
    weight, metric = random(*shape, seed=3), metric_for(shape)
    ours = small.squared_error(weight, metric)
    assert ours <= min(adam(small, weight, metric, seed) for seed in (10, 20)) * 1.05


@KINDS
def test_a_weight_of_the_form_is_recovered(choice: Decomposition) -> None:
    planted = choice.empty(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        for k, parameter in enumerate(planted.parameters()):
            parameter.copy_(random(*parameter.shape, seed=k))
        weight = planted.dense().reshape(SHAPE)
    # CP is local: what it reaches is checked by the descent above
    bound = 0.35 if choice.name == "cp" else 1e-7
    for metric in (None, metric_for(SHAPE)):
        matrix = choice.fit(weight, metric)
        assert choice.error(weight, matrix, metric) <= bound


@KINDS
@pytest.mark.parametrize(
    "metric",
    [
        Metric(torch.zeros(72, 72), torch.zeros(10, 10)),
        Metric(moment(72, 1, samples=2), moment(10, 2, samples=1)),
        Metric(moment(72, 1) * 1e-30, moment(10, 2) * 1e-30),
        Metric(torch.tensor([1.0] + [0.0] * 71), torch.tensor([0.0] * 9 + [5.0])),
        Metric(moment(72, 1).float(), None),
        Metric(None, moment(10, 2)),
    ],
    ids=["zero", "rank one", "tiny", "one feature", "float32", "S only"],
)
def test_degenerate_moments_do_no_harm(choice: Decomposition, metric: Metric) -> None:
    weight = random(*SHAPE)
    dense = choice.fit(weight, metric).dense().detach()
    assert bool(torch.isfinite(dense).all())
    plain = metric.squared_error(weight.flatten(1) - choice.fit(weight).dense().detach())
    assert metric.squared_error(weight.flatten(1) - dense) <= plain * (1 + 1e-6)


@KINDS
@pytest.mark.parametrize("side", ["input", "output"])
def test_moments_that_are_not_finite_are_told(choice: Decomposition, side: str) -> None:
    broken = moment({"input": 72, "output": 10}[side], 1)
    broken[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match="holds NaN or infinite values: calibrate on batches"):
        choice.fit(random(*SHAPE), Metric(**{side: broken}))


@KINDS
def test_a_fit_in_the_metric_has_about_the_error_that_its_curve_says(choice: Decomposition) -> None:
    weight, metric = random(*SHAPE), metric_for(SHAPE)
    points = type(choice)().curve(weight, metric)
    assert len(points) > 10
    for point in points[:: len(points) // 6]:
        error = point.decomposition.squared_error(weight, metric)
        assert error <= point.error * 1.5
        assert error >= point.error * (0.1 if choice.name == "cp" else 0.4)  # CP takes few steps for a curve


@KINDS
def test_a_larger_size_has_less_error_in_the_metric(choice: Decomposition) -> None:
    weight, metric = random(*SHAPE), metric_for(SHAPE)
    errors = []
    for share in (0.2, 0.4, 0.6, 0.8):
        kind = type(choice)().best_within(weight, metric, int(share * weight.numel()))
        assert kind is not None
        assert kind.num_params(SHAPE) <= share * weight.numel()
        errors.append(kind.squared_error(weight, metric))
    assert errors == sorted(errors, reverse=True)


def test_without_a_bound_on_the_outputs_the_plain_fit_is_the_truncated_svd() -> None:
    weight = random(6, 8, 5)
    unfolded = weight.transpose(0, 1).flatten(1)
    values = torch.linalg.svdvals(unfolded).square()
    errors = TuckerErrors.of(weight, Metric()).span_bounds()
    for rank in (1, 3, 7):
        found = fit_tucker(weight, Metric(), rank)
        dense = torch.einsum("obt,ib->oit", found.core, found.inner)
        missed = float(values[rank:].sum())
        assert float((weight - dense).square().sum()) == pytest.approx(missed, rel=1e-9)
        assert float(errors[rank - 1]) == pytest.approx(missed, rel=1e-9)


def test_the_errors_of_all_pairs_of_ranks_are_those_of_the_closed_form() -> None:
    weight, metric = random(6, 5, 4), metric_for((6, 5, 4))
    table = TuckerErrors.of(weight, metric).bounds([1, 3, 5])
    assert [len(errors) for errors in table] == [4, 6, 6]
    for rank_in, errors in zip([1, 3, 5], table, strict=True):
        assert bool((errors[:-1] >= errors[1:]).all())
        for rank_out in (1, 3):
            found = fit_tucker(weight, metric, rank_in, rank_out)
            assert found.out is not None
            dense = torch.einsum("oa,abt,ib->oit", found.out, found.core, found.inner).flatten(1)
            error = metric.squared_error(weight.flatten(1) - dense)
            assert 0.1 * float(errors[rank_out - 1]) <= error <= float(errors[rank_out - 1]) * (1 + 1e-6)
    assert float(table[-1][-1]) <= 1e-9 * metric.squared_error(weight.flatten(1))


def test_the_terms_of_a_cp_fit_are_balanced_and_do_not_cancel() -> None:
    weight, metric = random(*SHAPE), metric_for(SHAPE)
    factors = fit_cp(weight, metric, 20)
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    assert torch.allclose(norms, norms[:1].expand_as(norms))
    assert float(norms.prod(0).norm()) <= 5 * float(weight.norm())
