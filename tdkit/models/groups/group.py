"""A group of weights that share hidden units, and several groups that keep equally many."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.models.sites import Site
from tdkit.shapes import Shape
from tdkit.support.compatibility import parameters_of


def bias_of(site: Site) -> Tensor | None:
    """Returns the bias (out,) of the first layer that uses a weight."""
    return parameters_of(site.users[0].module).get("bias")


@dataclass(frozen=True, eq=False)
class Part:
    """One weight of a group, and which of its rows or columns each hidden unit is.

    Attributes:
        site: the weight.
        axis: 0 if the units are rows of the weight (out, in), 1 if they are columns.
        places: (units, size) int64, the rows or columns of each unit.
    """

    site: Site
    axis: int
    places: Tensor

    @property
    def size(self) -> int:
        """Rows, or columns, per unit."""
        return self.places.shape[1]

    @property
    def bias(self) -> Tensor | None:
        """The bias of its layer, (out,)."""
        return bias_of(self.site)

    @property
    def params_per_unit(self) -> int:
        """Parameters that go with a unit: of the weight and, if the units are its rows, of the bias."""
        biased = self.axis == 0 and self.bias is not None
        return self.size * (self.site.shape[1 - self.axis] + biased)

    def kept(self, units: Tensor) -> Tensor:
        """Returns the rows or columns that stay if `units` (kept,) stay, ascending, int64."""
        mask = torch.ones(self.site.shape[self.axis], dtype=torch.bool)
        mask[self.places.flatten()] = False
        mask[self.places[units].flatten()] = True
        return mask.nonzero().flatten()


@dataclass(frozen=True, eq=False)
class Group:
    """Weights that share hidden units.

    What lies between producers and consumer says what can be done with the units:

    - elementwise functions, as in an MLP: units can be removed, and the layers become smaller;
    - a linear map that is the same for all units of a head, as attention is for its values: the units of a head can
      first be replaced by combinations of them. The sizes of the layers' inputs and outputs stay;
    - a product of each unit of the producer with the same unit of the consumer, as of keys and queries: the units are
      rows of both. The sizes of the layers' outputs stay.

    Attributes:
        producers: the weights whose rows are the units.
        consumer: the weight that is refitted, whose columns are the units, or rows if it is multiplied with them.
        heads: the number of blocks of neighbouring units, of equal size, that keep equally many: the heads of
            attention, which so stay alike.
        combines: whether the units of a head can be replaced by combinations of them.
    """

    producers: tuple[Part, ...]
    consumer: Part
    heads: int = 1
    combines: bool = False

    @property
    def name(self) -> str:
        """The name of the weight that consumes the units, which identifies the group."""
        return self.consumer.site.name

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.producers, self.consumer)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(part.site for part in self.parts)

    @property
    def units(self) -> int:
        """The number of units of each head."""
        return len(self.consumer.places) // self.heads

    @property
    def keeps_sizes(self) -> bool:
        """Whether the inputs and outputs of the layers keep their sizes when units are removed."""
        return self.combines or self.consumer.axis == 0


@dataclass(frozen=True, eq=False)
class Bundle:
    """Groups that keep the same number of units: one group, or all of a kind.

    Its name, shape and params are what an allocator reads of a `Site`.
    """

    groups: tuple[Group, ...]

    @property
    def name(self) -> str:
        """The name of the first group."""
        return self.groups[0].name

    @property
    def shape(self) -> Shape:
        """(units, parameters that go with one unit of each head of each group)."""
        per_unit = (group.heads * part.params_per_unit for group in self.groups for part in group.parts)
        return self.groups[0].units, sum(per_unit)

    @property
    def params(self) -> int:
        return math.prod(self.shape)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for group in self.groups for site in group.sites)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)


class Pattern(ABC):
    """Finds groups of one kind by the names of their weights; other packages register more, see `registered`."""

    @abstractmethod
    def find(self, sites: Mapping[str, Site]) -> Iterator[Group]:
        """Iterate over the groups among sites, given by name."""
