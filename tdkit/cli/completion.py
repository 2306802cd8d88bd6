"""Names that the shell completes. They are listed without torch, which takes seconds to load, and without plugins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

# What the registries hold themselves; a test compares these with them.
DECOMPOSITIONS = (
    "auto",
    "blocks",
    "cp",
    "kronecker",
    "low_rank",
    "permuted_kronecker",
    "quantized",
    "shrink",
    "spatial_low_rank",
    "stacked",
    "submatrix",
    "tt_matrix",
    "tucker",
)
MODELS = ("smollm2",)
RECIPES = "tdkit.recipes"  # the package whose recipes tdkit ships, and the group of other packages'


def complete_decompositions(incomplete: str) -> list[str]:
    """Returns the registered decompositions that begin so."""
    return _matching([*DECOMPOSITIONS, *_entries("tdkit.decompositions")], incomplete)


def complete_models(incomplete: str) -> list[str]:
    """Returns the registered models that begin so, and the folders."""
    return _matching([*MODELS, *_entries("tdkit.models"), *_paths(incomplete, folders=True)], incomplete)


def complete_recipes(incomplete: str) -> list[str]:
    """Returns the recipes that begin so, and the YAML files."""
    return _matching([*_recipes(), *_paths(incomplete, folders=False)], incomplete)


def _matching(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def _entries(group: str) -> list[str]:
    return [entry.name for entry in entry_points(group=group)]


def _recipes() -> Iterator[str]:
    for package in [RECIPES, *(entry.value for entry in entry_points(group=RECIPES))]:
        try:
            spec = find_spec(package)
        except ImportError:  # of the package above it
            continue
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from (file.stem for file in Path(folder).glob("*.yaml"))


def _paths(incomplete: str, *, folders: bool) -> Iterator[str]:
    start = incomplete.rpartition("/")[0]
    above = Path(start or ("/" if incomplete.startswith("/") else "."))
    if above.is_dir():
        for path in above.iterdir():
            if path.name.startswith(".") or not (path.is_dir() or (not folders and path.suffix in (".yaml", ".yml"))):
                continue
            yield f"{incomplete[: incomplete.rfind('/') + 1]}{path.name}{'/' if path.is_dir() else ''}"
