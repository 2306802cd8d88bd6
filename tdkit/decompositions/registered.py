"""Decompositions by name, and their ``{name: {option: value}}`` form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tdkit.decompositions.base import Decomposition
from tdkit.errors import OptionError, did_you_mean, told_as
from tdkit.registry import Registry, subclass_fault

decompositions: Registry[type[Decomposition]] = Registry(
    "tdkit.decompositions",
    "decomposition",
    {
        "low_rank": "tdkit.decompositions.low_rank:LowRank",
        "kronecker": "tdkit.decompositions.kronecker:Kronecker",
        "permuted_kronecker": "tdkit.decompositions.permuted_kronecker:PermutedKronecker",
        "tt_matrix": "tdkit.decompositions.tt_matrix:TTMatrix",
        "tucker": "tdkit.decompositions.tucker:Tucker",
        "cp": "tdkit.decompositions.cp:CanonicalPolyadic",
        "spatial_low_rank": "tdkit.decompositions.spatial_low_rank:SpatialLowRank",
        "stacked": "tdkit.decompositions.stacked:Stacked",
        "blocks": "tdkit.decompositions.blocks:Blocks",
        "quantized": "tdkit.decompositions.quantized:Quantized",
        "submatrix": "tdkit.decompositions.submatrix:Submatrix",
        "shrink": "tdkit.decompositions.shrink:Shrink",
        "auto": "tdkit.decompositions.auto:Auto",
    },
    fault=subclass_fault(Decomposition),
)


def decomposition(spec: Decomposition | str | Mapping[str, Any]) -> Decomposition:
    """The decomposition that `spec` stands for: itself, a name, or ``{name: {option: value}}``.

    Raises:
        RegistryError: for an unknown name.
        OptionError: for an unknown or impossible option.
    """
    if isinstance(spec, Decomposition):
        return spec
    if isinstance(spec, str):
        spec = {spec: {}}
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise OptionError(f"a decomposition is a name or one 'name: {{options}}' pair, not {spec!r}")
    name, options = next(iter(spec.items()))
    kind = decompositions.get(str(name))
    options = options or {}
    if not isinstance(options, Mapping):
        raise OptionError(f"{name}: options must be 'option: value' pairs, not {options!r}")
    known = [f.name for f in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            hint = did_you_mean(str(option), known)
            raise OptionError(f"{name}: unknown option '{option}'{hint}; known: {', '.join(known) or 'none'}")
    with told_as(OptionError, f"{name} ({kind.__module__}) does not take these options"):
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def spec_of(item: Decomposition) -> dict[str, dict[str, Any]]:
    """The ``{name: {option: value}}`` form of a decomposition, which `decomposition` reads back."""
    return {item.name: item.options()}
