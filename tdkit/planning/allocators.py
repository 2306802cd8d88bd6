"""Allocators, which share a budget among weights: the registry and the built-in ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tdkit.calibration.calibration import Calibration
from tdkit.decompositions.base import Point
from tdkit.errors import BudgetError, PolicyError
from tdkit.planning.allocation import Choice, OpenSite, mixed, uniform
from tdkit.planning.budget import UNITS, Costs
from tdkit.planning.tempering import tempered
from tdkit.registry import Registry
from tdkit.support.processes import shared
from tdkit.support.progress import progress_bar


@dataclass(frozen=True)
class Request:
    """The input of an allocator.

    Attributes:
        sites: the weights whose size the allocator chooses.
        available: the maximum cost of these weights together, in the unit of the budget.
        place: where the budget was given, for error messages.
        calibration: the calibration of the model; None when there is none.
        progress: show a progress bar; when None, only on a terminal.
        costs: what choices cost in that unit: ``costs.of(site, decomposition)``; by default their parameters.
    """

    sites: Sequence[OpenSite]
    available: int
    place: str
    calibration: Calibration | None = None
    progress: bool | None = None
    costs: Costs = field(default_factory=Costs)

    @property
    def estimates_loss(self) -> bool:
        """Whether the calibration has output gradients, so that error curves estimate the loss."""
        return self.calibration is not None and self.calibration.gradients

    def curves(self, sites: Sequence[OpenSite]) -> dict[str, list[Point]]:
        """Returns, by site name, the points of the error curves of all alternatives of the site, concatenated.

        With a calibration with gradients, half of an error is the estimated increase of the loss in nats per token.
        Without a calibration the errors are squared Frobenius norms, which are not comparable between layers.
        """

        def curve(open_site: OpenSite) -> list[Point]:
            site = open_site.site
            bar.now(site.name)
            kinds = open_site.kind.alternatives(open_site.shape)
            if self.calibration is None:
                weight = open_site.weight()
                return [point for kind in kinds for point in kind.curve(kind.view(weight))]
            return [point for kind in kinds for point in self.calibration.curve(site, kind)]

        found = {}
        work = sum(open_site.site.params for open_site in sites)
        with progress_bar("error curves", len(sites), self.progress, work=work) as bar:
            for open_site, points in zip(sites, shared(sites, curve), strict=True):
                found[open_site.site.name] = points
                bar.advance(work=open_site.site.params)
        return found


Allocator = Callable[[Request], Mapping[str, Choice]]
"""Maps a request to one choice per site, by site name, of at most ``request.available`` cost together."""

allocators: Registry[Allocator] = Registry(
    "tdkit.allocators",
    "allocator",
    {
        "auto": "tdkit.planning.allocators:by_what_is_known",
        "loss": "tdkit.planning.allocators:by_estimated_loss",
        "uniform": "tdkit.planning.allocators:by_equal_shares",
    },
)


def allocate(name: str, request: Request) -> dict[str, Choice]:
    """Returns the checked choices of the allocator registered as `name`, by site name.

    Raises:
        RegistryError: when there is no such allocator.
        BudgetError: when the allocator cannot meet the budget, exceeds it, or does not choose for exactly its sites.
    """
    choices = tempered(request.sites, allocators.get(name)(request))
    wanted = {open_site.site.name for open_site in request.sites}
    if set(choices) != wanted:
        odd = ", ".join(sorted(set(choices) ^ wanted)[:5])
        raise BudgetError(
            f"allocator '{name}' must choose for every layer it is given and no other; it differs in {odd}"
        )
    held = 0
    for open_site in request.sites:
        held += request.costs.of(open_site.site, choices[open_site.site.name].decomposition)
    if held > max(request.available, 0):
        raise BudgetError(
            f"allocator '{name}' spends {held:,} {UNITS[request.costs.unit]} where "
            f"{request.place} leaves {request.available:,}: the fault is the allocator's"
        )
    return choices


def by_equal_shares(request: Request) -> dict[str, Choice]:
    """Choose the same share of parameters for every layer, within its bounds."""
    return uniform(request.sites, request.available, request.place, request.calibration, request.costs)


def by_estimated_loss(request: Request) -> dict[str, Choice]:
    """Choose the sizes with the least estimated loss; layers that the calibration did not reach get an equal share.

    Raises:
        PolicyError: when there is no calibration with gradients.
    """
    if not request.estimates_loss:
        raise PolicyError(
            "policy allocation='loss' estimates the loss from a calibration with gradients: give calibration=, "
            "measured with gradients=True, or use allocation='uniform'"
        )
    return by_what_is_known(request)


def by_what_is_known(request: Request) -> dict[str, Choice]:
    """Choose by estimated loss with a calibration with gradients, and by equal shares otherwise."""
    known = set(request.calibration.names) if request.calibration and request.estimates_loss else set()
    reached = [s for s in request.sites if s.site.name in known]
    unreached = [s for s in request.sites if s.site.name not in known]
    if not reached:
        return by_equal_shares(request)
    choices: dict[str, Choice] = {}
    available = request.available
    if unreached:  # their effect on the loss was not measured
        cost = request.costs.of
        share = available / max(sum(cost(s.site) for s in request.sites), 1)
        part = int(share * sum(cost(s.site) for s in unreached))
        place = f"{request.place}, for the layers that the calibration did not reach,"
        choices = uniform(unreached, part, place, request.calibration, request.costs)
        available -= part
    return choices | mixed(reached, request.curves(reached), available, request.place, request.costs)
