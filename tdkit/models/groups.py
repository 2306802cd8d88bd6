"""Groups of weights that share hidden units: the rows of some are the units that another one takes as its columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.errors import RegistryError
from tdkit.models.sites import Site
from tdkit.registry import Registry
from tdkit.shapes import Shape
from tdkit.support.compatibility import parameters_of


@dataclass(frozen=True, eq=False)
class Part:
    """One weight of a group, and which of its rows or columns each hidden unit is.

    Attributes:
        site: the weight.
        axis: 0 if the units are rows of the weight (out, in), which produces them; 1 if they are columns.
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
        return parameters_of(self.site.users[0].module).get("bias")

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

    Attributes:
        producers: the weights whose rows are the units.
        consumer: the weight whose columns are the units.
    """

    producers: tuple[Part, ...]
    consumer: Part

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
        return len(self.consumer.places)


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
        """(units, parameters that go with one unit of each group)."""
        return self.groups[0].units, sum(part.params_per_unit for group in self.groups for part in group.parts)

    @property
    def params(self) -> int:
        return math.prod(self.shape)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for group in self.groups for site in group.sites)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)


@dataclass(frozen=True)
class Pattern:
    """Names of weights that share hidden units wherever one module holds them all.

    Attributes:
        producers: names of the weights that produce the units, relative to the module.
        consumer: the name of the weight that consumes them.
        packed: how many weights are stacked in each producer, each with a row per unit.
    """

    producers: tuple[str, ...]
    consumer: str
    packed: int = 1

    def find(self, sites: Mapping[str, Site]) -> Iterator[Group]:
        """Iterate over the groups among sites, by name, whose shapes fit the pattern."""
        for name, consumer in sites.items():
            prefix = name.removesuffix(self.consumer)
            if prefix == name or (prefix and not prefix.endswith(".")):
                continue
            producers = [sites.get(prefix + producer) for producer in self.producers]
            units = consumer.shape[1]
            if any(site is None or len(site.shape) > 2 or site.shape[0] != self.packed * units for site in producers):
                continue
            rows = torch.arange(self.packed * units).reshape(self.packed, units).T
            columns = torch.arange(units)[:, None]
            parts = tuple(Part(site, 0, rows) for site in producers if site is not None)
            yield Group(parts, Part(consumer, 1, columns))


PATTERNS = (
    Pattern(("gate_proj", "up_proj"), "down_proj"),  # LLaMA, Mistral, Qwen, Gemma and others
    Pattern(("gate_up_proj",), "down_proj", packed=2),  # Phi-3
    Pattern(("up_proj",), "down_proj"),  # Nemotron, MPT
    Pattern(("w1", "w3"), "w2"),  # LLaMA as published
    Pattern(("c_fc",), "c_proj"),  # GPT-2, StarCoder2
    Pattern(("fc1",), "fc2"),  # OPT, Phi, CLIP, Whisper
    Pattern(("fc_in",), "fc_out"),  # GPT-J
    Pattern(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    Pattern(("intermediate.dense",), "output.dense"),  # BERT, ViT
    Pattern(("wi",), "wo"),  # T5
    Pattern(("wi_0", "wi_1"), "wo"),  # T5 1.1
    Pattern(("lin1",), "lin2"),  # DistilBERT
    Pattern(("linear1",), "linear2"),  # nn.TransformerEncoderLayer
    Pattern(("pwconv1",), "pwconv2"),  # ConvNeXt
    Pattern(("intermediate_dense",), "output_dense"),  # wav2vec 2.0
)
"""The patterns of tdkit itself, registered as ``built_in``."""

patterns: Registry[Sequence[Pattern]] = Registry(
    "tdkit.groups", "group pattern", {"built_in": "tdkit.models.groups:PATTERNS"}
)


def groups_of(sites: Sequence[Site], shared: Sequence[str] = ()) -> list[Group]:
    """Returns the groups among sites, in their order; each site belongs to one group at most.

    Args:
        shared: names of weights that share hidden units, the consumer last; the registered patterns when empty.
    """
    known = {site.name: site for site in sites}
    tried = [Pattern(tuple(shared[:-1]), shared[-1])] if shared else _registered()
    found: dict[str, Group] = {}
    taken: set[str] = set()
    for pattern in tried:
        for group in pattern.find(known):
            names = {site.name for site in group.sites}
            if refusal(group) is None and not names & taken:
                taken |= names
                found[group.consumer.site.name] = group
    return [found[site.name] for site in sites if site.name in found]


def refusal(group: Group) -> str | None:
    """Returns why the layers of a group cannot have other sizes, or None."""
    for site in group.sites:
        user = site.users[0]
        if len(site.users) > 1:
            return f"{site.name} is shared with {site.names[1]}"
        if site.stacked or not user.host.resizes or user.weight != "weight":
            return f"{site.name} is a {user.kind}, whose size is not changed"
    return None


def _registered() -> list[Pattern]:
    found: list[Pattern] = []
    for name in patterns.names():
        given = patterns.get(name)
        if not isinstance(given, list | tuple) or not all(isinstance(one, Pattern) for one in given):
            raise RegistryError(f"group pattern '{name}' must be a tuple of tdkit.models.groups.Pattern")
        found += given
    return found
