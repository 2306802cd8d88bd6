"""The fits that carry out a plan: one for each weight that becomes factors, one for each group that shrinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tdkit.calibration.calibration import elimination_of
from tdkit.compression.fit import fit_step
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.decompositions.shrink import Shrink
from tdkit.fitting.elimination import Elimination
from tdkit.fitting.metric import Metric
from tdkit.models.groups.group import Group
from tdkit.models.shrinking import masked, shrunk
from tdkit.models.sites import Site
from tdkit.models.swap import Resized
from tdkit.planning.grouping import shrunk_groups
from tdkit.planning.step import Step

MetricOf = Callable[[str], Metric | None]
"""Maps the name of a site to its metric."""

EliminationOf = Callable[[Group, Shrink], Elimination]


@dataclass(frozen=True)
class FactorJob:
    """The fit of one weight."""

    step: Step
    site: Site

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def sites(self) -> tuple[Site, ...]:
        """What is replaced."""
        return (self.site,)

    @property
    def measured(self) -> Site:
        """The site whose metric the fit needs."""
        return self.site

    def fit(self, metric_of: MetricOf, device: torch.device | str | None = None) -> list[FactorizedMatrix | Resized]:
        """Returns what replaces each of `sites`."""
        return [fit_step(self.step, self.site, metric_of(self.site.name), device)]


@dataclass(frozen=True)
class ShrinkJob:
    """The removal of units from one group.

    Attributes:
        group: the weights.
        kind: how many units stay, and which.
        elimination: looks up the elimination of a group in its calibrated metric; it is made in the metric at hand
            when None.
        keep_size: only set the columns of the consumer to zero that belong to the removed units. The moments of all
            units can then be measured again.
    """

    group: Group
    kind: Shrink
    elimination: EliminationOf | None = None
    keep_size: bool = False

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.group.consumer.site,) if self.keep_size else self.group.sites

    @property
    def measured(self) -> Site:
        return self.group.consumer.site

    def fit(self, metric_of: MetricOf, device: torch.device | str | None = None) -> list[FactorizedMatrix | Resized]:
        metric = metric_of(self.group.name)
        found = self.elimination(self.group, self.kind) if self.elimination else None
        found = found or elimination_of(self.group, self.kind, metric)
        units = found.kept(self.kind.units or 0)
        if self.keep_size:
            return [masked(self.group, units, metric)]
        return list(shrunk(self.group, units, metric))


Job = FactorJob | ShrinkJob


def jobs_of(
    pairs: Sequence[tuple[Step, Site]], *, elimination: EliminationOf | None = None, keep_size: bool = False
) -> list[Job]:
    """Returns the fits of the steps of a plan, in their order, those of groups last.

    Args:
        pairs: the steps that replace a weight, each with its site.
        elimination, keep_size: as in `ShrinkJob`.

    Raises:
        PolicyError: when steps that shrink weights form no groups.
    """
    single = [FactorJob(step, site) for step, site in pairs if not isinstance(step.decomposition, Shrink)]
    groups = [ShrinkJob(group, kind, elimination, keep_size) for group, kind in shrunk_groups(pairs)]
    return [*single, *groups]
