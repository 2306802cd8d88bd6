"""A recipe: a model, its data and typed steps in order; how it is read, checked and overridden."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module, resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tdkit.errors import RecipeError, RegistryError, TdkitError, did_you_mean
from tdkit.losses import Labels
from tdkit.registry import Registry

if TYPE_CHECKING:  # a step is handed the run that carries out its recipe, one room above
    from tdkit.running import Run

GROUP = "tdkit.recipes"
BUILT_IN = "tdkit.recipes"


class Checked(BaseModel):
    """Base of everything a recipe is made of: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StepConfig(Checked, ABC):
    """One kind of step and its options.

    A kind is registered through the entry-point group ``tdkit.steps``, whose name is the key in YAML.
    """

    changes_model: ClassVar[bool] = False  # whether the model must be saved when the step is done
    needs_dense: ClassVar[bool] = False  # whether the step reads `Run.dense`, the model before any change

    @abstractmethod
    def run(self, run: Run) -> dict[str, Any]:
        """Do it; return JSON-able figures, which are kept in the run folder."""

    def check(self, recipe: Recipe) -> None:
        """Raise a TdkitError for what can be known to fail before any work starts."""

    def outline(self) -> str:
        """One line for ``tdkit show`` and ``--dry-run``."""
        options = self.model_dump(exclude_defaults=True, by_alias=True)
        return ", ".join(f"{key}={value}" for key, value in options.items())


steps: Registry[type[StepConfig]] = Registry(
    "tdkit.steps",
    "step",
    {
        "compress": "tdkit.steps:CompressStep",
        "compare": "tdkit.steps:CompareStep",
        "evaluate": "tdkit.steps:EvaluateStep",
        "generate": "tdkit.steps:GenerateStep",
        "save": "tdkit.steps:SaveStep",
    },
)

Texts = str | list[str]


class DataConfig(Checked):
    """Which texts a recipe reads.

    Attributes:
        train, calibration, evaluation: built-in names, files, folders or datasets; see `load_texts`.
        calibration_tokens, evaluation_tokens: how many tokens of them are used.
        calibration_labels: the text's own next tokens, or ones "sampled" from the model; see `calibrate`.
        context: tokens per window.
        share: of the training text, chosen by the seed.
    """

    train: Texts | None = None
    calibration: Texts | None = None
    evaluation: Texts | None = None
    calibration_tokens: int = Field(default=16384, ge=1)
    evaluation_tokens: int = Field(default=16384, ge=1)
    calibration_labels: Labels = "data"
    context: int = Field(default=1024, ge=2)
    share: float = Field(default=1.0, gt=0, le=1)


class Recipe(Checked):
    """A whole recipe.

    Attributes:
        name, description, source: what it is, and which paper it follows.
        model: built-in name, folder or hub name.
        dtype: of the weights.
        data: texts.
        seed: of everything random.
        steps: in order.
    """

    name: str
    description: str = ""
    source: str = ""
    model: str
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    data: DataConfig = DataConfig()
    seed: int = Field(default=0, ge=0)
    steps: tuple[tuple[str, StepConfig], ...]

    @classmethod
    def from_dict(cls, form: Mapping[str, Any], place: str = "recipe") -> Recipe:
        """A recipe from its YAML form.

        Raises:
            RecipeError: with every fault of it at once.
        """
        if not isinstance(form, Mapping):
            raise RecipeError(f"{place}: a recipe is a mapping with 'name', 'model' and 'steps'")
        problems: list[str] = []
        parsed = []
        entries = form.get("steps")
        if not isinstance(entries, list) or not entries:
            problems.append("steps: give a list of steps, each 'kind: {options}'")
            entries = []
        for number, entry in enumerate(entries):
            try:
                parsed.append(_step(entry))
            except ValidationError as error:
                problems += _faults(error, f"steps.{number}.{next(iter(entry))}")
            except TdkitError as error:
                problems += [f"steps.{number}: {line}" for line in str(error).splitlines()]
        try:
            recipe = cls(**{**{str(key): value for key, value in form.items()}, "steps": ()})
        except ValidationError as error:
            problems = _faults(error) + problems
        if not problems:
            recipe = recipe.model_copy(update={"steps": tuple(parsed)})
            for number, (kind, step) in enumerate(recipe.steps):
                try:
                    step.check(recipe)
                except TdkitError as error:
                    problems += [f"steps.{number}.{kind}: {line}" for line in str(error).splitlines()]
        if problems:
            raise RecipeError("\n".join(f"{place}: {problem}" for problem in problems))
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """The YAML form, without what is left at its default."""
        form = self.model_dump(mode="json", exclude_defaults=True, exclude={"steps"})
        form["steps"] = [
            {kind: step.model_dump(mode="json", exclude_defaults=True, by_alias=True)} for kind, step in self.steps
        ]
        return form

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _step(entry: Any) -> tuple[str, StepConfig]:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RecipeError(f"a step is one 'kind: {{options}}' pair, not {entry!r}")
    kind, options = next(iter(entry.items()))
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise RecipeError(f"{kind}: options must be 'option: value' pairs, not {options!r}")
    return str(kind), steps.get(str(kind)).model_validate(dict(options))


def _faults(error: ValidationError, place: str = "") -> list[str]:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in (place, *fault["loc"]) if part != "")
        message = "unknown key" if fault["type"] == "extra_forbidden" else fault["msg"]
        value = "" if fault["type"] == "missing" else f" (got {str(fault['input'])[:80]!r})"
        lines.append(f"{where}: {message}{value}")
    return lines


def recipe_files() -> dict[str, list[tuple[str, Any]]]:
    """Every recipe name with the packages that ship it and the file of each.

    Raises:
        RegistryError: when an entry point fails to import.
    """
    packages = [("tdkit", BUILT_IN)]
    packages += [(entry.dist.name if entry.dist else entry.name, entry.value) for entry in entry_points(group=GROUP)]
    found: dict[str, list[tuple[str, Any]]] = {}
    for owner, package in packages:
        try:
            folder = resources.files(import_module(package))
        except ImportError as error:
            raise RegistryError(f"the recipes of package {owner} ({package}) failed to import: {error}") from error
        for file in folder.iterdir():
            if file.name.endswith(".yaml"):
                found.setdefault(file.name.removesuffix(".yaml"), []).append((owner, file))
    return dict(sorted(found.items()))


def recipe_text(name: str) -> str:
    """The YAML of a recipe by registered name or by path.

    Raises:
        RegistryError: for an unknown name, or one that two packages ship.
        RecipeError: when a file cannot be read.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
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
    """A recipe by registered name or path, with ``key.sub=value`` overrides (values are YAML).

    Steps are addressed by their number: ``steps.0.compress.budget=0.5``.

    Raises:
        RegistryError, RecipeError: with every fault at once.
    """
    try:
        form = yaml.safe_load(recipe_text(name))
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not YAML: {error}") from None
    for override in overrides:
        _override(form, override)
    return Recipe.from_dict(form, name)


def _override(form: Any, override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"override '{override}' must be key=value, such as model=PATH or data.context=512")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override '{override}': the value is not YAML: {error}") from None
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
