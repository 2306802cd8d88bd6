"""Load recipes by registered name or path, with overrides."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module, resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tdkit.errors import RecipeError, RegistryError, TdkitError, did_you_mean
from tdkit.recipes.recipe import Recipe
from tdkit.support.documents import parse_yaml, read_text

GROUP = "tdkit.recipes"
BUILT_IN = "tdkit.recipes"


def recipe_files() -> dict[str, list[tuple[str, Any]]]:
    """Returns, for every recipe name, the packages that ship it with the file of each.

    Raises:
        RegistryError: when an entry point fails to import.
    """
    packages = [("tdkit", BUILT_IN)]
    packages += [(entry.dist.name if entry.dist else entry.name, entry.value) for entry in entry_points(group=GROUP)]
    found: dict[str, list[tuple[str, Any]]] = {}
    for owner, package in packages:
        try:
            folder = resources.files(import_module(package))
        except (Exception, SystemExit) as error:
            raise RegistryError(
                f"the recipes of package {owner} ({package}) failed to import: {type(error).__name__}: {error}"
            ) from error
        for file in folder.iterdir():
            if file.name.endswith(".yaml"):
                found.setdefault(file.name.removesuffix(".yaml"), []).append((owner, file))
    return dict(sorted(found.items()))


def recipe_text(name: str) -> str:
    """Returns the YAML text of a recipe, by registered name or by path.

    Raises:
        RegistryError: when the name is unknown, or two packages ship it.
        RecipeError: when a file cannot be read.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return read_text(path)
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe file {path} cannot be read: {error}") from None
    files = recipe_files()
    if name not in files:
        raise RegistryError(f"unknown recipe '{name}'{did_you_mean(name, files)}; known: {', '.join(files) or 'none'}")
    if len(files[name]) > 1:
        owners = " and ".join(owner for owner, _ in files[name])
        raise RegistryError(f"recipe '{name}' is provided by {owners}; uninstall one, or give the path of a file")
    text: str = files[name][0][1].read_text(encoding="utf-8")
    return text


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by registered name or path, with ``key.sub=value`` overrides (values are YAML).

    Steps are addressed by their index: ``steps.0.compress.budget=0.5``.

    Raises:
        RegistryError: when the name is unknown, or two packages ship it.
        RecipeError: when an override or the recipe is invalid; lists all faults of the recipe.
    """
    try:
        form = parse_yaml(recipe_text(name))
    except TdkitError:  # some are ValueErrors too
        raise
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from None
    for override in overrides:
        _override(form, override)
    return Recipe.from_dict(form, name)


def _override(form: Any, override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"override '{override}' must be key=value, such as model=PATH or data.context=512")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"override '{override}': the value cannot be read: {error}") from None
    keys = path.split(".")
    place = form
    for number, key in enumerate(keys):
        last = number == len(keys) - 1
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise RecipeError(f"override '{override}': '{key}' is no position among {len(place)} entries")
            index: Any = int(key)
        elif isinstance(place, dict):
            index = key
            if not last and place.get(key) is None:
                place[key] = {}
        else:
            raise RecipeError(f"override '{override}': '{'.'.join(keys[:number])}' has no parts")
        if last:
            place[index] = value
        else:
            place = place[index]
