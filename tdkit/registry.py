"""Names to decompositions, recipes and recipe steps: what tdkit ships and what other packages add.

A package adds one through an entry point; nothing is imported before it is asked for, a name taken twice
is an error that names both packages, and an entry that fails to import breaks only itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from tdkit.decompositions.base import Decomposition
from tdkit.errors import OptionError, RegistryError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Lazily loaded named objects of one entry-point group."""

    def __init__(self, group: str, noun: str, built_in: Mapping[str, str]) -> None:
        self.group = group
        self.noun = noun
        self._built_in = dict(built_in)
        self._loaded: dict[str, T] = {}

    def origins(self) -> dict[str, list[str]]:
        """Each name with the packages that provide it; more than one is a conflict."""
        found: dict[str, list[str]] = {name: ["tdkit"] for name in self._built_in}
        for entry in self._entries():
            found.setdefault(entry.name, []).append(_package(entry))
        return dict(sorted(found.items()))

    def names(self) -> list[str]:
        """Every name, sorted; nothing is imported."""
        return list(self.origins())

    def get(self, name: str) -> T:
        """The object registered under `name`.

        Raises:
            RegistryError: when the name is unknown (the nearest is suggested), provided by two packages,
                or its entry point fails to import.
        """
        if name in self._loaded:
            return self._loaded[name]
        origins = self.origins()
        if name not in origins:
            raise RegistryError(
                f"unknown {self.noun} '{name}'{did_you_mean(name, origins)}; known: {', '.join(origins) or 'none'}"
            )
        if len(origins[name]) > 1:
            raise RegistryError(
                f"{self.noun} '{name}' is provided by {' and '.join(origins[name])}; uninstall one or rename it"
            )
        self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> T:
        if name in self._built_in:
            module, _, attribute = self._built_in[name].partition(":")
            loaded: T = getattr(import_module(module), attribute)
            return loaded
        entry = next(e for e in self._entries() if e.name == name)
        try:
            loaded = entry.load()
        except Exception as error:
            raise RegistryError(
                f"{self.noun} '{name}' of package {_package(entry)} ({entry.value}) failed to import: "
                f"{type(error).__name__}: {error}"
            ) from error
        return loaded

    def _entries(self) -> list[EntryPoint]:
        return list(entry_points(group=self.group))


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


decompositions: Registry[type[Decomposition]] = Registry(
    "tdkit.decompositions",
    "decomposition",
    {
        "low_rank": "tdkit.decompositions.low_rank:LowRank",
        "kronecker": "tdkit.decompositions.kronecker:Kronecker",
        "permuted_kronecker": "tdkit.decompositions.permuted_kronecker:PermutedKronecker",
        "tt_matrix": "tdkit.decompositions.tt_matrix:TTMatrix",
        "auto": "tdkit.auto:Auto",
    },
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
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def spec_of(item: Decomposition) -> dict[str, dict[str, Any]]:
    """The ``{name: {option: value}}`` form of a decomposition, which `decomposition` reads back."""
    return {item.name: item.options()}
