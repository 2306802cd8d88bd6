"""Elimination of units against brute force: every order, every cost and every refit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdkit import Metric
from tdkit.fitting.elimination import eliminate, in_order, leverage_scores, refitted
from tests.fitting.moments import moment, random


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Metric]:
    return random(rows, columns, seed=seed), Metric(moment(columns, seed + 1), moment(rows, seed + 2))


def least_error(weight: Tensor, metric: Metric, kept: Tensor) -> float:
    """tr(S E C E^T) with the best values in the columns `kept`, by least squares on a root of C."""
    moment = metric.ridged_input()
    root = torch.eye(weight.shape[1]).double() if moment is None else torch.linalg.cholesky(moment)
    fitted = torch.linalg.lstsq(root[kept].T, root.T @ weight.T).solution.T
    gap = weight.clone()
    gap[:, kept] -= fitted
    return metric.squared_error(gap)


def as_units(columns: int, size: int) -> Tensor:
    return torch.arange(columns).reshape(size, -1).T


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 3), st.sampled_from([1, 2, 16]))
def test_the_running_error_is_that_of_the_refit_at_every_width(seed: int, units: int, size: int, block: int) -> None:
    weight, metric = problem(5, units * size, seed)
    columns = as_units(units * size, size)
    found = eliminate(weight, metric, columns, block=block)
    assert sorted(found.order.tolist()) == list(range(units))
    for width in range(1, units + 1):
        kept = columns[found.kept(width)].flatten()
        assert found.error(width) == pytest.approx(least_error(weight, metric, kept), rel=1e-6, abs=1e-9)
        gap = weight.clone()
        gap[:, kept] -= refitted(weight, metric, kept)
        assert metric.squared_error(gap) == pytest.approx(found.error(width), rel=1e-6, abs=1e-9)
    assert found.error(0) == pytest.approx(metric.squared_error(weight), rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 5), st.integers(1, 2))
def test_heads_keep_equally_many_with_the_error_of_the_refit(seed: int, heads: int, units: int, size: int) -> None:
    weight, metric = problem(5, heads * units * size, seed)
    columns = as_units(heads * units * size, size)
    found = eliminate(weight, metric, columns, heads=heads)
    assert sorted(found.order.tolist()) == list(range(heads * units))
    for width in range(1, units + 1):
        kept = found.kept(width)
        assert torch.bincount(kept // units, minlength=heads).tolist() == [width] * heads
        expected = least_error(weight, metric, columns[kept].flatten())
        assert found.error(width) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert found.error(0) == pytest.approx(metric.squared_error(weight), rel=1e-6)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000))
def test_each_unit_removed_is_the_one_that_costs_least(seed: int) -> None:
    weight, metric = problem(4, 6, seed)
    columns = as_units(6, 2)
    found = eliminate(weight, metric, columns, block=1)
    left = set(range(3))
    for unit in found.order.tolist()[:-1]:
        errors = {u: least_error(weight, metric, columns[sorted(left - {u})].flatten()) for u in left}
        assert errors[unit] == pytest.approx(min(errors.values()), rel=1e-9)
        left.remove(unit)


def test_one_by_one_it_is_near_the_best_subset() -> None:
    ratios = []
    for seed in range(12):
        weight, metric = problem(6, 8, 10 * seed)
        subsets = itertools.combinations(range(8), 4)
        errors = torch.tensor([least_error(weight, metric, torch.tensor(kept)) for kept in subsets])
        found = eliminate(weight, metric, block=1).error(4)
        assert found < errors.quantile(0.2)
        ratios.append(found / float(errors.min()))
    assert sum(ratios) / len(ratios) < 1.3


@pytest.mark.parametrize("size", [1, 2])
def test_a_given_order_has_the_errors_of_its_refits(size: int) -> None:
    weight, metric = problem(5, 8, 0)
    columns, order = as_units(8, size), torch.randperm(8 // size, generator=torch.Generator().manual_seed(0))
    found = in_order(weight, metric, order, columns)
    for width in range(1, len(order)):
        kept = columns[order[len(order) - width :]].flatten()
        assert found.error(width) == pytest.approx(least_error(weight, metric, kept), rel=1e-6)


@pytest.mark.parametrize("metric", [Metric(), Metric(torch.rand(8) + 0.1), Metric(None, torch.rand(5) + 0.1)])
def test_without_correlations_the_columns_of_least_energy_go_and_the_others_stay_as_they_are(metric: Metric) -> None:
    weight = random(5, 8)
    found = eliminate(weight, metric)
    energies = torch.stack([torch.tensor(metric.squared_error(weight * torch.eye(8)[j])) for j in range(8)])
    assert found.order.tolist() == energies.argsort().tolist()
    assert torch.equal(refitted(weight, metric, found.kept(4)), weight[:, found.kept(4)])


def test_columns_of_no_unit_stay_and_take_over() -> None:
    weight, metric = problem(5, 8, 1)
    columns = torch.tensor([[1], [4], [6]])
    found = eliminate(weight, metric, columns, block=1)
    kept = torch.tensor(sorted({0, 2, 3, 5, 7} | {int(columns[found.order[-1]])}))
    assert found.error(1) == pytest.approx(least_error(weight, metric, kept), rel=1e-6)


def test_a_unit_that_others_determine_costs_nothing() -> None:
    x = random(400, 6)
    x[:, 2] = x[:, 0] - 2 * x[:, 5]
    weight = random(4, 6, seed=1)
    metric = Metric(x.T @ x / len(x))
    found = eliminate(weight, metric, block=1)
    assert int(found.order[0]) in (0, 2, 5)
    assert found.error(5) < 1e-4 * found.error(4)


def test_leverage_scores_are_those_of_the_definition() -> None:
    c = moment(6, 0)
    expected = (c @ torch.linalg.inv(c + 0.3 * torch.eye(6).double())).diagonal()
    assert torch.allclose(leverage_scores(c, 0.3), expected)


def test_float32_weights_are_eliminated_in_float64() -> None:
    weight, metric = problem(5, 8, 2)
    assert torch.allclose(eliminate(weight.float(), metric).errors, eliminate(weight, metric).errors, rtol=1e-5)
    assert refitted(weight.float(), metric, torch.arange(4)).dtype == torch.float64
