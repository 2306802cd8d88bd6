"""Budgets to choices: uniform shares, and the least estimated loss over error curves."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tdkit import Auto, Kronecker, LowRank
from tdkit.decompositions.base import Decomposition, Point
from tdkit.decompositions.stacked import Stacked
from tdkit.errors import BudgetError
from tdkit.models.sites import Site, survey
from tdkit.planning.allocation import Choice, OpenSite, _Option, by_loss, lower_hull, mixed, uniform


def sites(*shapes: tuple[int, int]) -> list[Site]:
    model = nn.Sequential(*(nn.Linear(inner, out, bias=False) for out, inner in shapes))
    return list(survey(model).sites)


def opened(*shapes: tuple[int, int], **bounds: float) -> list[OpenSite]:
    return [OpenSite(site, LowRank(), **bounds) for site in sites(*shapes)]


def held(open_sites: list[OpenSite], choices: dict[str, Choice]) -> int:
    total = 0
    for s in open_sites:
        kind = choices[s.site.name].decomposition
        total += s.site.params if kind is None else kind.num_params(s.site.shape)
    return total


def spectrum_curve(values: list[float], shape: tuple[int, int]) -> list[Point]:
    """The curve of a low-rank fit of a matrix with these squared singular values."""
    points = []
    for rank in range(1, len(values) + 1):
        params = rank * sum(shape)
        if params < shape[0] * shape[1]:
            points.append(Point(LowRank(rank=rank), params, sum(values[rank:])))
    return points


def test_uniform_gives_each_site_its_share() -> None:
    found = opened((40, 60), (60, 40), (50, 50))
    choices = uniform(found, int(0.5 * 7300), "test")
    for s in found:
        kind = choices[s.site.name].decomposition
        assert kind is not None
        assert kind.num_params(s.site.shape) <= 0.5 * s.site.params < kind.num_params(s.site.shape) + sum(s.site.shape)


def test_uniform_keeps_to_bounds_and_hands_on_what_they_leave() -> None:
    first, second, third = opened((40, 60), (60, 40), (50, 50))
    low = OpenSite(first.site, LowRank(), max_keep=0.2)
    high = OpenSite(second.site, LowRank(), min_keep=0.7)
    found = [low, high, third]
    choices = uniform(found, int(0.5 * 7300), "test")
    sizes = {s.site.name: held([s], choices) / s.site.params for s in found}
    assert sizes[first.site.name] <= 0.2
    assert 0.65 < sizes[second.site.name] <= 0.7
    assert 0.5 < sizes[third.site.name] <= 0.65
    assert held(found, choices) <= 0.5 * 7300


def test_uniform_refuses_what_cannot_be_met() -> None:
    with pytest.raises(BudgetError, match="too few for the smallest choice of low_rank"):
        uniform(opened((40, 60)), 90, "test")
    sites = opened((40, 60), (6, 6))
    with pytest.raises(
        BudgetError, match=r"test leaves 90 params for 2 layers that hold 2,436: .* low_rank \("
    ) as told:
        uniform(sites, 90, "test")
    assert all(s.site.name in str(told.value) for s in sites)


spectra = st.lists(
    st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6).map(lambda v: sorted(v, reverse=True)),
    min_size=2,
    max_size=3,
)


def curves_of(values: list[list[float]]) -> tuple[list[OpenSite], dict[str, list[Point]], list[list[Point]]]:
    """Sites, their curves, and for each site all that it can become, the dense weight included."""
    found = opened(*[(12, 6), (8, 8), (6, 10)][: len(values)])
    curves = {s.site.name: spectrum_curve(v, s.site.shape) for s, v in zip(found, values, strict=True)}
    return found, curves, [[*curves[s.site.name], Point(LowRank(), s.site.params, 0.0)] for s in found]


@settings(max_examples=60, deadline=None)
@given(spectra, st.floats(0.4, 0.95))
def test_by_loss_is_near_the_best_of_all_choices(values: list[list[float]], share: float) -> None:
    found, curves, every = curves_of(values)
    available = int(share * sum(s.site.params for s in found))
    choices = by_loss(found, curves, available, "test")
    assert held(found, choices) <= available

    affordable = [c for c in itertools.product(*every) if sum(p.params for p in c) <= available]
    best = min(sum(p.error for p in c) for c in affordable)
    chosen = sum(c.error or 0.0 for c in choices.values())
    hulls = [lower_hull([_Option(p.params, p.params, p.error, p.decomposition) for p in points]) for points in every]
    step = max(low.error - high.error for hull in hulls for low, high in itertools.pairwise(hull))
    assert best - 1e-9 <= chosen <= best + step  # the greedy algorithm loses at most one step of one hull


@settings(max_examples=60, deadline=None)
@given(spectra, st.floats(1e-3, 1e2))
def test_by_loss_is_the_best_of_all_choices_for_a_budget_of_whole_steps(
    values: list[list[float]], price: float
) -> None:
    """What minimises error + price * params has the least error of all that hold as many params (Everett, 1963)."""
    found, curves, every = curves_of(values)
    cheapest = [min(points, key=lambda p: p.error + price * p.params) for points in every]
    choices = by_loss(found, curves, sum(p.params for p in cheapest), "test")
    assert sum(c.error or 0.0 for c in choices.values()) == pytest.approx(sum(p.error for p in cheapest))


def test_by_loss_leaves_nothing_that_could_still_be_spent() -> None:
    torch.manual_seed(0)
    found = opened(*[(30, 20)] * 6)
    curves = {
        s.site.name: spectrum_curve(sorted((torch.rand(20) ** 3).tolist(), reverse=True), s.site.shape) for s in found
    }
    dense = sum(s.site.params for s in found)
    for share in (0.3, 0.5, 0.71, 0.9):
        left = int(share * dense) - held(found, by_loss(found, curves, int(share * dense), "test"))
        assert 0 <= left < 50  # less than one more rank of any layer


def test_by_loss_puts_the_rank_where_the_error_is() -> None:
    found = opened((20, 20), (20, 20))
    flat, steep = ([1.0] * 20, [100.0, 50.0, 20.0] + [1e-3] * 17)
    curves = {s.site.name: spectrum_curve(v, s.site.shape) for s, v in zip(found, (flat, steep), strict=True)}
    choices = by_loss(found, curves, 520, "test")
    assert choices["0"].decomposition is None  # the flat one pays best dense: its last step frees no error cheaply
    assert choices["1"].decomposition == LowRank(rank=3)
    assert choices["1"].error == pytest.approx(17e-3)


def test_by_loss_keeps_to_bounds() -> None:
    found = opened((20, 20), (20, 20), min_keep=0.3, max_keep=0.6)
    curves = {s.site.name: spectrum_curve([1.0] * 20, s.site.shape) for s in found}
    choices = by_loss(found, curves, 400, "test")
    for s in found:
        assert 0.3 <= held([s], choices) / 400 <= 0.6
    with pytest.raises(BudgetError, match=r"no low_rank holds between min_keep=0.96 and max_keep=0.99"):
        by_loss(opened((20, 20), min_keep=0.96, max_keep=0.99), curves, 400, "test")
    with pytest.raises(BudgetError, match="too few"):
        by_loss(found, curves, 200, "test")


class Other(LowRank):
    name = "other"


def test_the_runner_up_is_the_best_other_of_at_most_that_size() -> None:
    (found,) = opened((20, 20))
    other: Decomposition = Other(rank=2)
    curve = [Point(LowRank(rank=2), 80, 5.0), Point(other, 70, 6.0), Point(Other(rank=1), 50, 9.0)]
    choice = by_loss([found], {found.site.name: curve}, 100, "test")[found.site.name]
    assert choice.decomposition == LowRank(rank=2)
    assert choice.runner_up == Point(other, 70, 6.0)


@pytest.mark.parametrize(("gain", "names"), [(0.01, {"low_rank"}), (0.3, {"low_rank", "other"})])
def test_decompositions_are_mixed_only_where_that_pays(gain: float, names: set[str]) -> None:
    sites = [OpenSite(s.site, Auto(among=["low_rank", "kronecker"])) for s in opened((20, 20), (20, 20))]
    first, second = (s.site.name for s in sites)
    curves = {
        first: [Point(LowRank(rank=2), 80, 1.0), Point(Other(rank=2), 80, 2.0)],
        second: [Point(LowRank(rank=2), 80, 1.0), Point(Other(rank=2), 80, 1.0 - gain)],
    }
    choices = mixed(sites, curves, 160, "test")
    assert {choice.decomposition.name for choice in choices.values()} == names
    assert choices[first].runner_up == Point(Other(rank=2), 80, 2.0)
    assert choices[second].runner_up is not None


@pytest.mark.parametrize(
    "other",
    [Kronecker(terms=1, a=(2, 2)), Stacked(each=LowRank(rank=2), shared=True, side="input")],
    ids=["another decomposition", "shared factors"],
)
def test_more_alternatives_never_make_the_estimated_loss_larger(other: Decomposition) -> None:
    """With the other decomposition the floor of 120 params can be held; it must not be at any price."""
    found = [OpenSite(site, Auto(), floor=0.05) for site in sites((40, 60), (40, 60))]
    plain = {100: (1.0, 100.0), 200: (0.9, 1.0)}  # by params: the errors of both sites
    curves = {
        s.site.name: [
            *(Point(LowRank(rank=params // 100), params, errors[number]) for params, errors in plain.items()),
            Point(other, 130, (0.95, 90.0)[number]),
        ]
        for number, s in enumerate(found)
    }
    assert sum(choice.error or 0 for choice in by_loss(found, curves, 300, "test").values()) == 90.95
    assert sum(choice.error or 0 for choice in mixed(found, curves, 300, "test").values()) == 2.0


def test_by_loss_holds_the_floor_only_where_the_budget_allows_it() -> None:
    found = opened((40, 40), (40, 40), floor=0.2)
    flat, steep = ([100.0] * 40, [1e-6] * 40)
    curves = {s.site.name: spectrum_curve(v, s.site.shape) for s, v in zip(found, (flat, steep), strict=True)}
    high, low = (by_loss(found, curves, most, "test") for most in (1800, 600))
    assert high["1"].decomposition == LowRank(rank=4)  # 320 of 1600 params
    assert low["1"].decomposition == LowRank(rank=1)
    without = by_loss(opened((40, 40), (40, 40)), curves, 1800, "test")
    assert without["1"].decomposition == LowRank(rank=2)


def test_a_site_whose_every_choice_is_below_the_floor_is_not_kept_for_that() -> None:
    (found,) = opened((40, 40), floor=0.5)
    curve = [Point(LowRank(rank=1), 80, 2.0), Point(LowRank(rank=2), 160, 1.0)]
    choice = by_loss([found], {found.site.name: curve}, 400, "test")[found.site.name]
    assert choice.decomposition == LowRank(rank=2)
