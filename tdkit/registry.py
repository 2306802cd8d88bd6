"""Names to objects of one kind, such as decompositions or recipe steps: those tdkit ships and those of other packages.

A package adds one through an entry point; nothing is imported before it is asked for, a name taken twice
is an error that names both packages, and an entry that fails to import breaks only itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from tdkit.errors import RegistryError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Lazily loaded named objects of one entry-point group.

    Args:
        group: the entry points' group, such as ``tdkit.steps``.
        noun: what one of the objects is called in errors.
        built_in: what tdkit ships itself: name to ``module:attribute``, as in an entry point.
        fault: takes a name and the object loaded for it, and says what is wrong with it (None: nothing).
    """

    def __init__(
        self,
        group: str,
        noun: str,
        built_in: Mapping[str, str],
        fault: Callable[[str, object], str | None] | None = None,
    ) -> None:
        self.group = group
        self.noun = noun
        self._built_in = dict(built_in)
        self._fault = fault
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
                or its entry point fails to import or is not what the registry holds.
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

    def summary(self, name: str) -> str:
        """The first line of the docstring of what is registered under `name`, or why it cannot be had."""
        try:
            lines = (self.get(name).__doc__ or "").strip().splitlines()
        except RegistryError as error:
            return f"unavailable: {error}"
        return lines[0] if lines else ""

    def _load(self, name: str) -> T:
        if name in self._built_in:
            module, _, attribute = self._built_in[name].partition(":")
            loaded: T = getattr(import_module(module), attribute)
            return loaded
        entry = next(e for e in self._entries() if e.name == name)
        place = f"{self.noun} '{name}' of package {_package(entry)} ({entry.value})"
        try:
            loaded = entry.load()
        except (Exception, SystemExit) as error:
            raise RegistryError(f"{place} failed to import: {type(error).__name__}: {error}") from error
        fault = self._fault(name, loaded) if self._fault is not None else None
        if fault is not None:
            raise RegistryError(f"{place}: {fault}")
        return loaded

    def _entries(self) -> list[EntryPoint]:
        return list(entry_points(group=self.group))


def subclass_fault(base: type) -> Callable[[str, object], str | None]:
    """The `fault` of a registry of subclasses of `base` whose ``name`` must be the one they are registered under."""

    def fault(name: str, loaded: object) -> str | None:
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            return f"it must be a subclass of {base.__module__}.{base.__qualname__}"
        own = getattr(loaded, "name", None)
        return None if own == name else f"its `name` is {own!r}, and must be that of the entry point, '{name}'"

    return fault


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value
