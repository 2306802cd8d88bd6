"""How a parameter budget is shared among the weights that it is for: the registry of allocators, and those shipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tdkit.calibration.calibration import Calibration
from tdkit.decompositions.base import Point
from tdkit.errors import BudgetError, PolicyError
from tdkit.planning.allocation import Choice, OpenSite, mixed, uniform
from tdkit.registry import Registry
from tdkit.support.processes import shared
from tdkit.support.progress import progress_bar


@dataclass(frozen=True)
class Request:
    """What an allocator is asked for.

    Attributes:
        sites: the weights whose size the budget chooses.
        available: parameters that they may hold together.
        place: what asked for the budget, for errors.
        calibration: of the model, where there is one.
        progress: show a progress bar; on a terminal only when None.
    """

    sites: Sequence[OpenSite]
    available: int
    place: str
    calibration: Calibration | None = None
    progress: bool | None = None

    @property
    def estimates_loss(self) -> bool:
        """Whether the calibration has output gradients, so that error curves estimate the loss."""
        return self.calibration is not None and self.calibration.gradients

    def curves(self, sites: Sequence[OpenSite]) -> dict[str, list[Point]]:
        """By site name, the error curves of a site's decompositions one after the other, in its calibrated metric.

        Half an error is the estimated increase of the loss, in nats per token. Without a calibration errors are
        squared Frobenius norms, which say nothing about one layer beside another.
        """

        def curve(open_site: OpenSite) -> list[Point]:
            site = open_site.site
            bar.now(site.name)
            kinds = open_site.kind.alternatives(site.shape)
            if self.calibration is None:
                return [point for kind in kinds for point in kind.curve(site.weight.detach())]
            return [point for kind in kinds for point in self.calibration.curve(site, kind)]

        found = {}
        with progress_bar("error curves", len(sites), self.progress) as bar:
            for open_site, points in zip(sites, shared(sites, curve), strict=True):
                found[open_site.site.name] = points
                bar.advance()
        return found


Allocator = Callable[[Request], Mapping[str, Choice]]
"""From a request to the choice of every site in it, by site name; together within ``request.available``."""

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
    """The choices of the allocator called `name`, checked.

    Raises:
        RegistryError: when there is no such allocator.
        BudgetError: when it cannot meet the budget, or does not.
    """
    choices = dict(allocators.get(name)(request))
    wanted = {open_site.site.name for open_site in request.sites}
    if set(choices) != wanted:
        odd = ", ".join(sorted(set(choices) ^ wanted)[:5])
        raise BudgetError(
            f"allocator '{name}' must choose for every layer it is given and no other; it differs in {odd}"
        )
    held = 0
    for open_site in request.sites:
        kind, site = choices[open_site.site.name].decomposition, open_site.site
        held += site.params if kind is None else kind.num_params(site.shape)
    if held > max(request.available, 0):
        raise BudgetError(
            f"allocator '{name}' spends {held:,} params where {request.place} leaves {request.available:,}: "
            "the fault is the allocator's"
        )
    return choices


def by_equal_shares(request: Request) -> dict[str, Choice]:
    """The same share of its parameters for every layer, within its bounds."""
    return uniform(request.sites, request.available, request.place, request.calibration)


def by_estimated_loss(request: Request) -> dict[str, Choice]:
    """The sizes with the least estimated loss; layers that the calibration did not reach get the share of all.

    Raises:
        PolicyError: without a calibration with gradients.
    """
    if not request.estimates_loss:
        raise PolicyError(
            "policy allocation='loss' estimates the loss from a calibration with gradients: give calibration=, "
            "measured with gradients=True, or use allocation='uniform'"
        )
    return by_what_is_known(request)


def by_what_is_known(request: Request) -> dict[str, Choice]:
    """By the estimated loss where a calibration with gradients gives one, by equal shares otherwise."""
    known = set(request.calibration.names) if request.calibration and request.estimates_loss else set()
    reached = [s for s in request.sites if s.site.name in known]
    unreached = [s for s in request.sites if s.site.name not in known]
    if not reached:
        return by_equal_shares(request)
    choices: dict[str, Choice] = {}
    available = request.available
    if unreached:  # no batch says how much they matter
        share = available / sum(s.site.params for s in request.sites)
        part = int(share * sum(s.site.params for s in unreached))
        place = f"{request.place}, for the layers that the calibration did not reach,"
        choices = uniform(unreached, part, place, request.calibration)
        available -= part
    return choices | mixed(reached, request.curves(reached), available, request.place)
