"""Choose one decomposition with a rank for each layer within a parameter budget."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tdkit.calibration.calibration import Calibration
from tdkit.decompositions.base import Decomposition, Point
from tdkit.errors import BudgetError, PolicyError
from tdkit.models.groups.group import Bundle
from tdkit.models.sites import Site
from tdkit.planning.budget import UNITS, Costs
from tdkit.shapes import Shape

FLOOR = 0.05  # default lower bound on params after / params before of a layer whose rank a budget chooses
MIXED_GAIN = 0.03  # of the estimated loss; SmolLM2 at 80%: estimate 1.5% lower, measured perplexity 2.9% higher


@dataclass(frozen=True)
class Choice:
    """The decomposition chosen for a site, or the reason why the site stays dense.

    Attributes:
        decomposition: complete, with its rank set; None when the site stays dense.
        reason: why the site stays dense; empty otherwise.
        error: estimated tr(S E C E^T) with E the error of the weight (out, in), C (in, in) and S (out, out) the
            calibrated moments; None when the choice was not made from an error curve.
        runner_up: the point with the least error among those of other decompositions with at most as many
            parameters; None when there is none.
    """

    decomposition: Decomposition | None
    reason: str = ""
    error: float | None = None
    runner_up: Point | None = None


@dataclass(frozen=True)
class OpenSite:
    """A site, or a bundle of groups, whose size is chosen from the budget.

    Attributes:
        site: the weight, or the groups of weights.
        kind: the decomposition, with its rank not set.
        min_keep: lower bound on params after / params before; no bound when None.
        max_keep: upper bound on params after / params before; no bound when None.
        floor: lower bound that an allocator holds where the budget allows it; 0 for none.
    """

    site: Site | Bundle
    kind: Decomposition
    min_keep: float | None = None
    max_keep: float | None = None
    floor: float = 0.0

    @property
    def shape(self) -> Shape:
        """The shape in which `kind` takes the weight."""
        return self.kind.shape_of(self.site.shape)

    def within(self, params: int) -> bool:
        """Returns whether a number of parameters is within the bounds."""
        low, high = self.min_keep or 0, 1 if self.max_keep is None else self.max_keep
        return low * self.site.params <= params <= high * self.site.params

    def clipped(self, share: float) -> float:
        """Returns `share` clamped to the bounds."""
        return min(max(share, self.min_keep or 0), 1 if self.max_keep is None else self.max_keep)

    def weight(self) -> Tensor:
        """Returns the weight in that shape.

        Raises:
            PolicyError: when it is on the meta device, or has NaN or infinite entries.
        """
        assert isinstance(self.site, Site)
        if self.site.weight.is_meta:
            raise PolicyError(
                f"{self.site.name} is on the meta device and holds no numbers, which choosing by error needs: load the "
                "model, or name one decomposition and plan without calibration"
            )
        return self.kind.view(self.site.finite_weight())

    def complete(
        self, share: float, calibration: Calibration | None, costs: Costs | None = None
    ) -> Decomposition | None:
        """Returns the best complete decomposition with at most `share` of the dense cost, or None.

        Costs are parameters when `costs` is None.
        """
        costs = costs or Costs()
        most = math.floor(share * self.site.params)
        limit = share * costs.of(self.site)
        while most > 0:
            found = self._within(most, calibration)
            cost = 0 if found is None else costs.of(self.site, found)
            if found is None or cost <= limit:
                return found
            most = min(most - 1, math.floor(most * limit / cost))
        return None

    def _within(self, most: int, calibration: Calibration | None) -> Decomposition | None:
        """Returns the best complete decomposition with at most `most` parameters, or None."""
        if not self.is_choice():
            return self.kind.complete(self.shape, most)
        metric = calibration.fit_metric(self.site.name) if calibration else None
        if metric is not None:
            metric.check(self.site.name, self.site.shape)
        return self.kind.best_within(self.weight().clone(), metric, most)  # the model's own is not handed over

    def is_choice(self) -> bool:
        """Returns whether `kind` has several alternatives to choose from."""
        return list(self.kind.alternatives(self.shape)) != [self.kind]


def uniform(
    sites: Sequence[OpenSite],
    available: int,
    place: str,
    calibration: Calibration | None = None,
    costs: Costs | None = None,
) -> dict[str, Choice]:
    """Choose for every site the same share of its dense cost, within its bounds.

    A site for which no choice is as small as the share stays dense, and the others share what remains.

    Args:
        sites: sites whose rank is not set.
        available: the maximum cost of these sites together.
        place: where the budget was given, for the error message.
        calibration: used to compare decompositions where a site has several alternatives.
        costs: what choices cost; their parameters when None.

    Returns:
        The choices by site name.

    Raises:
        BudgetError: when not even the smallest choices fit.
    """
    costs = costs or Costs()
    cost = {s.site.name: costs.of(s.site) for s in sites}
    free = [s for s in sites if not cost[s.site.name]]  # such as look-ups, which multiply nothing
    if free:
        rest = (
            uniform([s for s in sites if cost[s.site.name]], available, place, calibration, costs) if available else {}
        )
        return rest | {s.site.name: Choice(None, "its size does not count in the budget") for s in free}
    if available >= sum(cost.values()) and not any(s.max_keep for s in sites):
        return {s.site.name: Choice(None, "the budget is met without it") for s in sites}
    chosen: dict[str, Choice] = {}
    given, shared = available, list(sites)
    while shared:
        share = available / sum(cost[s.site.name] for s in shared)
        bounded = [s for s in shared if s.clipped(share) > share] or [s for s in shared if s.clipped(share) < share]
        fits = {
            s.site.name: s.complete(s.clipped(share), calibration, costs) if share > 0 else None
            for s in (bounded or shared)
        }
        stuck = [s for s in (bounded or shared) if fits[s.site.name] is None]
        settled = stuck or bounded
        for s in settled or shared:
            kind = fits[s.site.name]
            chosen[s.site.name] = Choice(
                kind,
                "" if kind else f"no {s.kind.name} has {max(share, 0):.0%} of its {s.site.params:,} params",
            )
            available -= costs.of(s.site, kind)
        if not settled:
            return chosen
        shared = [s for s in shared if s not in settled]
        if not shared and available >= 0:
            return chosen
    large = tuple(name for name, choice in chosen.items() if not choice.decomposition)
    raise _too_little(place, given, sites, costs, large)


def by_loss(
    sites: Sequence[OpenSite],
    curves: Mapping[str, Sequence[Point]],
    available: int,
    place: str,
    *,
    rivals: Mapping[str, Sequence[Point]] | None = None,
    costs: Costs | None = None,
) -> dict[str, Choice]:
    """Choose the sizes with the least total error, read from the error curves, within a cost of `available`.

    The dense weight, with zero error, is the last point of each curve. Starting from the smallest choices, steps
    along the lower convex hull of the curves of all sites are taken in the order of error removed per cost.
    This is optimal for every budget that a whole number of steps uses up. What remains is spent on
    the points, on the hull or not, that remove most error. The floors of the sites hold if the budget allows all of
    them.

    Args:
        sites: sites whose rank is not set.
        curves: by site name, points of the site's decompositions with their error, in the same unit for all sites.
        available: the maximum cost of these sites together.
        place: where the budget was given, for the error message.
        rivals: the points from which the runner-up is taken; those of `curves` when None.
        costs: what choices cost; their parameters when None.

    Returns:
        The choices by site name.

    Raises:
        BudgetError: when not even the smallest choices fit, or no point of a site is within its bounds.

    Source: the greedy optimum of separable convex resource allocation, Fox (1966).
    """
    costs = costs or Costs()
    options = {s.site.name: _options(s, curves[s.site.name], costs) for s in sites}
    floored = {s.site.name: _above_floor(s, options[s.site.name]) for s in sites}
    if sum(points[0].cost for points in floored.values()) <= available:
        options = floored
    held = {name: points[0] for name, points in options.items()}
    left = available - sum(point.cost for point in held.values())
    if left < 0:
        raise _too_little(place, available, sites, costs)
    steps = [
        (-(low.error - high.error) / (high.cost - low.cost), order, high.cost, name, high)
        for order, (name, points) in enumerate(options.items())
        for low, high in _pairs(lower_hull(points))
    ]
    stopped: set[str] = set()
    for _, _, _, name, point in sorted(steps, key=lambda step: step[:3]):
        if name in stopped:
            continue
        cost = point.cost - held[name].cost
        if cost > left:
            stopped.add(name)
        else:
            held[name], left = point, left - cost
    held = _spend(held, options, left)
    return {name: _choice(point, (rivals or curves)[name]) for name, point in held.items()}


def mixed(
    sites: Sequence[OpenSite],
    curves: Mapping[str, Sequence[Point]],
    available: int,
    place: str,
    costs: Costs | None = None,
) -> dict[str, Choice]:
    """Like `by_loss`, but never with a larger estimated loss than with fewer decompositions to choose from.

    The greedy choice and the floors can make more alternatives worse. So all sites with a choice are also given a
    single decomposition, each in turn, and none of the factors that members of a stack share. A mixture of several
    decompositions in one model must gain the fraction `MIXED_GAIN` over the best single one; smaller differences are
    within the error of the estimate.
    """
    free = {s.site.name for s in sites if s.is_choice()}
    families = sorted({point.decomposition.family for name in free for point in curves[name]})
    chosen = by_loss(sites, curves, available, place, costs=costs)
    used = {choice.decomposition.family for choice in chosen.values() if choice.decomposition is not None}
    limit = _total(chosen) / (1 - MIXED_GAIN) if len(used) > 1 else _total(chosen)
    for family, shares in itertools.product([*families, None], (True, False)):
        own = {
            name: [p for p in points if name not in free or _is_within(p.decomposition, family, shares)]
            for name, points in curves.items()
        }
        if own == curves or not all(own[name] for name in free):
            continue
        try:
            fewer = by_loss(sites, own, available, place, rivals=curves, costs=costs)
        except BudgetError:  # a site has no point of this decomposition within its bounds
            continue
        error = _total(fewer) if family is not None or len(used) < 2 else _total(fewer) / (1 - MIXED_GAIN)
        if error < limit:
            chosen, limit = fewer, error
    return chosen


def _is_within(kind: Decomposition, family: str | None, shares: bool) -> bool:
    """Returns whether a decomposition is of the family, if one is given, and shares factors only if that is allowed."""
    return family in (None, kind.family) and (shares or not kind.shares)


def _total(choices: Mapping[str, Choice]) -> float:
    return sum(choice.error or 0.0 for choice in choices.values())


@dataclass(frozen=True)
class _Option:
    cost: int
    params: int
    error: float
    decomposition: Decomposition | None


def _options(open_site: OpenSite, curve: Sequence[Point], costs: Costs) -> list[_Option]:
    """Returns the Pareto-optimal options of a site within its bounds, the dense weight included, by rising cost."""
    dense = open_site.site.params
    site = open_site.site
    every = [
        _Option(costs.of(site, p.decomposition, p.params), p.params, p.error, p.decomposition)
        for p in curve
        if p.params < dense
    ]
    every.append(_Option(costs.of(site), dense, 0.0, None))
    kept: list[_Option] = []
    for option in sorted((o for o in every if open_site.within(o.params)), key=lambda o: (o.cost, o.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    if not kept:
        raise BudgetError(
            f"{open_site.site.name}: no {open_site.kind.name} holds between min_keep={open_site.min_keep} and "
            f"max_keep={open_site.max_keep} of its {dense:,} params"
        )
    return kept


def _above_floor(open_site: OpenSite, options: list[_Option]) -> list[_Option]:
    """Returns the options of at least the floor, or all if only the dense weight is."""
    above = [option for option in options if option.params >= open_site.floor * open_site.site.params]
    return above if any(option.decomposition is not None for option in above) else options


def lower_hull(points: Sequence[_Option]) -> list[_Option]:
    """Returns the points on the lower convex hull, by rising cost. Source: Andrew (1979)."""
    hull: list[_Option] = []
    for point in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(left: _Option, middle: _Option, right: _Option) -> bool:
    """Returns whether `middle` lies on or above the line from `left` to `right`."""
    return (middle.error - left.error) * (right.cost - left.cost) >= (right.error - left.error) * (
        middle.cost - left.cost
    )


def _pairs(hull: list[_Option]) -> list[tuple[_Option, _Option]]:
    return list(itertools.pairwise(hull))


def _spend(held: dict[str, _Option], options: Mapping[str, list[_Option]], left: int) -> dict[str, _Option]:
    """Spend what is left greedily: replace the option whose replacement removes most error and fits."""
    sizes = {name: [option.cost for option in points] for name, points in options.items()}
    while True:
        best: tuple[float, str, _Option] | None = None
        for name, points in options.items():
            richest = points[bisect.bisect_right(sizes[name], held[name].cost + left) - 1]
            gain = held[name].error - richest.error
            if gain > 0 and (best is None or gain > best[0]):
                best = gain, name, richest
        if best is None:
            return held
        _, name, option = best
        left -= option.cost - held[name].cost
        held[name] = option


def _choice(option: _Option, curve: Sequence[Point]) -> Choice:
    if option.decomposition is None:
        return Choice(None, "its parameters pay where they are", 0.0)
    others = [p for p in curve if p.decomposition.name != option.decomposition.name and p.params <= option.params]
    return Choice(option.decomposition, "", option.error, min(others, key=lambda p: p.error, default=None))


def _too_little(
    place: str, available: int, sites: Sequence[OpenSite], costs: Costs, dense: Sequence[str] = ()
) -> BudgetError:
    """An error that says what a budget leaves for some sites.

    Args:
        dense: the names of those that have no choice of their share and would stay dense.
    """
    large = f" ({', '.join(dense[:3])}{f' and {len(dense) - 3} more' if len(dense) > 3 else ''})" if dense else ""
    return BudgetError(
        f"{place} leaves {available:,} {UNITS[costs.unit]} for {len(sites)} layers that hold "
        f"{sum(costs.of(s.site) for s in sites):,}: too few for the smallest choice of "
        f"{', '.join(sorted({s.kind.name for s in sites}))}{large}; raise the budget or match more layers"
    )
