"""Batched fits equal those of each member; a factor in common is exact where it can be, and optimal elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdkit import Metric
from tdkit.errors import CalibrationError
from tdkit.fitting.low_rank import squared_singular_values, truncated_in_metric
from tdkit.fitting.shared_basis import SharedBasis

MEMBERS, OUT, IN = 4, 9, 7


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(size: int, seed: int) -> Tensor:
    rows = random(MEMBERS, 30, size, seed=seed) * random(MEMBERS, 1, size, seed=seed + 1).exp()
    return rows.mT @ rows / 30


METRICS = {
    "no moments": Metric(),
    "C": Metric(input=moments(IN, 1)),
    "S": Metric(output=moments(OUT, 3)),
    "C and S": Metric(moments(IN, 1), moments(OUT, 3)),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)], ids=["tall", "wide"])
def test_batched_low_rank_fits_are_those_of_each_member(metric: Metric, shape: tuple[int, int]) -> None:
    if shape == (IN, OUT):
        metric = Metric(metric.output, metric.input)
    weight = random(MEMBERS, *shape, seed=0)
    left, right = truncated_in_metric(weight, 3, metric)
    squares = squared_singular_values(weight, metric)
    for number in range(MEMBERS):
        one = truncated_in_metric(weight[number], 3, metric.of(number))
        torch.testing.assert_close(left[number] @ right[number], one[0] @ one[1])
        torch.testing.assert_close(squares[number], squared_singular_values(weight[number], metric.of(number)))
    some = truncated_in_metric(weight[1:3], 3, metric.of(slice(1, 3)))
    torch.testing.assert_close(some[0] @ some[1], left[1:3] @ right[1:3])


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_errors_of_a_stack_are_sums_over_its_members(metric: Metric) -> None:
    gap = random(MEMBERS, OUT, IN, seed=5)
    whole = sum(metric.of(number).squared_error(gap[number]) for number in range(MEMBERS))
    assert metric.squared_error(gap) == pytest.approx(whole, rel=1e-12)


def test_a_member_without_rows_has_the_identity_and_a_moment_that_is_not_finite_is_refused() -> None:
    inputs = moments(IN, 1)
    inputs[2] = 0
    ridged = Metric(inputs).ridged_input()
    assert ridged is not None
    assert torch.equal(ridged[2], torch.eye(IN, dtype=torch.float64))
    torch.testing.assert_close(ridged[1], Metric(inputs[1]).ridged_input())
    assert Metric(torch.zeros(MEMBERS, IN, IN)).ridged_input() is None
    inputs[2, 0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"a second moment of 7 features holds NaN or infinite values"):
        Metric(inputs).ridged_input()


def test_without_inputs_the_common_rows_are_the_leading_singular_vectors_of_the_stack() -> None:
    weight = random(MEMBERS, OUT, IN, seed=0)
    _, values, vectors = torch.linalg.svd(weight.flatten(0, 1))
    basis = SharedBasis(weight, None, None)
    left, right = basis.fit(3)
    torch.testing.assert_close(left @ right, weight @ vectors[:3].T @ vectors[:3])
    torch.testing.assert_close(basis.errors()[:-1], values.square().flip(0).cumsum(0).flip(0)[1:])


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_errors_of_a_common_basis_are_those_of_its_fits(metric: Metric) -> None:
    weight = random(MEMBERS, OUT, IN, seed=0)
    basis = SharedBasis(weight, metric.ridged_input(), metric.ridged_output())
    errors = basis.errors()
    for rank in range(1, IN + 1):
        left, right = basis.fit(rank)
        assert left.shape == (MEMBERS, OUT, rank)
        assert right.shape == (rank, IN)
        real = metric.squared_error(weight - left @ right)
        assert float(errors[rank - 1]) == pytest.approx(real, rel=1e-8, abs=1e-9 * metric.squared_error(weight))


def test_given_the_common_rows_each_member_has_the_least_error_in_its_own_metric() -> None:
    weight, metric = random(MEMBERS, OUT, IN, seed=0), METRICS["C and S"]
    left, right = SharedBasis(weight, metric.ridged_input(), metric.ridged_output()).fit(3)
    left.requires_grad_()
    inner, outer = metric.ridged_input(), metric.ridged_output()
    assert inner is not None
    assert outer is not None
    gap = weight - left @ right
    (slope,) = torch.autograd.grad((gap * (outer @ gap @ inner)).sum(), left)
    assert float(slope.abs().max()) < 1e-8 * metric.squared_error(weight)
