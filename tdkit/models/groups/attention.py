"""Hidden units of attention: the dimensions of values, and those of queries and keys, of each key-value head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.models.groups.group import Group, Part, Pattern
from tdkit.models.sites import Site


@dataclass(frozen=True)
class Values(Pattern):
    """Names of the projections to values and of the heads' results, relative to the module that holds both.

    The module has the size of a head as ``head_dim`` or ``head_size``. Several heads can share the same values.
    """

    value: str
    output: str

    def find(self, sites: Mapping[str, Site]) -> Iterator[Group]:
        """Iterate over the groups of the dimensions of each head of values."""
        for value, output, size in _together(sites, self.value, self.output):
            heads, shared = value.shape[0] // size, output.shape[1] // value.shape[0]
            if value.shape[0] % size == 0 and heads * shared * size == output.shape[1]:
                rows, columns = dimensions(heads, 1, size), dimensions(heads, shared, size)
                yield Group((Part(value, 0, rows),), Part(output, 1, columns), heads=heads, combines=True)


@dataclass(frozen=True)
class Queries(Pattern):
    """Names of the projections to keys and queries, relative to the module that holds both, as in `Values`.

    Rotary position embeddings turn the dimensions j and j + head_dim / 2 of both together: these are one unit.
    """

    key: str
    query: str

    def find(self, sites: Mapping[str, Site]) -> Iterator[Group]:
        """Iterate over the groups of the pairs of dimensions of each head of keys."""
        for key, query, size in _together(sites, self.key, self.query):
            heads, shared = key.shape[0] // size, query.shape[0] // key.shape[0]
            if size % 2 == 0 and key.shape[0] % size == 0 and heads * shared * size == query.shape[0]:
                rows, every = dimensions(heads, 1, size), dimensions(heads, shared, size)
                yield Group((Part(key, 0, pairs(rows, heads)),), Part(query, 0, pairs(every, heads)), heads=heads)


def _together(sites: Mapping[str, Site], first: str, second: str) -> Iterator[tuple[Site, Site, int]]:
    """Iterate over two matrices of each module that holds both, and the size of its heads."""
    for name, site in sites.items():
        prefix = name.removesuffix(second)
        other = sites.get(prefix + first)
        if prefix == name or (prefix and not prefix.endswith(".")) or other is None:
            continue
        size = _head_size(site)
        if size is not None and len(site.shape) == len(other.shape) == 2:
            yield other, site, size


def dimensions(heads: int, shared: int, size: int) -> Tensor:
    """Returns the places of each dimension of each key-value head in the `shared` query heads that use it.

    Returns:
        (heads * size, shared), int64: those of unit (head, dimension).
    """
    places = torch.arange(heads * shared * size).reshape(heads, shared, size)
    return places.transpose(1, 2).reshape(heads * size, shared)


def pairs(places: Tensor, heads: int) -> Tensor:
    """Returns the places of the pairs of dimensions j and j + size / 2: (heads * size / 2, 2 * shared), int64."""
    halves = places.reshape(heads, 2, -1, places.shape[1])
    return torch.cat([halves[:, 0], halves[:, 1]], -1).reshape(-1, 2 * places.shape[1])


def _head_size(site: Site) -> int | None:
    user = site.users[0]
    parent = user.model.get_submodule(user.layer.rpartition(".")[0])
    sizes = (getattr(parent, name, None) for name in ("head_dim", "head_size"))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


PATTERNS = (
    Values("v_proj", "o_proj"),  # LLaMA, Mistral, Qwen, Gemma and others
    Values("v_proj", "out_proj"),  # OPT, CLIP, Whisper
    Values("v_proj", "dense"),  # Phi, Persimmon
    Queries("k_proj", "q_proj"),
)
"""Registered as ``attention``."""
