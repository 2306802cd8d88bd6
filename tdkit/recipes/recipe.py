"""Recipes: a model, its data and an ordered list of typed steps, parsed from YAML and validated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from rich.console import Console
from torch import Tensor, nn

from tdkit.calibration.batches import Batch
from tdkit.calibration.calibration import Calibration
from tdkit.calibration.losses import Labels
from tdkit.calibration.self_generated import with_self_generated
from tdkit.errors import RecipeError, SourceError, TdkitError
from tdkit.planning.planner import calibrated
from tdkit.planning.resolution import Resolved
from tdkit.records.record import Data, Record
from tdkit.registry import Registry
from tdkit.sources.documents import sha256
from tdkit.sources.positions import check_positions
from tdkit.sources.texts import encode, load_texts, windows
from tdkit.support.processes import on_main_process

STATE = "state.json"  # in the run folder: the recipe, the number of finished steps and their results

RECIPE_FILE = "recipe.yaml"

RECORDS = "records"  # in the run folder: a record of each compression


class Checked(BaseModel):
    """Base class of the parts of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StepConfig(Checked, ABC):
    """Base class of the steps of a recipe; the fields are the options.

    A step is registered in the entry-point group ``tdkit.steps`` under the name that is its key in YAML.
    """

    changes_model: ClassVar[bool] = False  # whether to save the model after the step
    needs_dense: ClassVar[bool] = False  # whether the step uses `Run.dense`, the original model
    compares: ClassVar[bool] = False  # whether it makes several models, with a record each, and goes on with one
    saves_model: ClassVar[bool] = False  # whether the step leaves a copy of the model; one that no step saves is kept

    @abstractmethod
    def run(self, run: Run) -> dict[str, Any]:
        """Run the step; returns JSON-serialisable results, which are written to the run folder."""

    def check(self, recipe: Recipe) -> None:
        """Raise a `TdkitError` if the step cannot succeed, judged by the recipe alone. Called before any work."""

    def check_model(self, run: Run) -> None:
        """Raise a `TdkitError` if the step cannot succeed with the loaded model. Called before the first step runs."""

    def outline(self) -> str:
        """Returns one line for ``tdkit show`` and ``--dry-run``."""
        options = self.model_dump(exclude_defaults=True, by_alias=True)
        return ", ".join(f"{key}={value}" for key, value in options.items())


steps: Registry[type[StepConfig]] = Registry(
    "tdkit.steps",
    "step",
    {
        "compress": "tdkit.recipes.steps:CompressStep",
        "compare": "tdkit.recipes.steps:CompareStep",
        "frontier": "tdkit.recipes.frontier:FrontierStep",
        "evaluate": "tdkit.recipes.steps:EvaluateStep",
        "generate": "tdkit.recipes.steps:GenerateStep",
        "save": "tdkit.recipes.steps:SaveStep",
    },
)

Texts = str | list[str]


class DataConfig(Checked):
    """The texts of a recipe.

    Attributes:
        train: the training text: files, folders, registered names or datasets, see `load_texts`.
        calibration: the calibration text, likewise.
        evaluation: the evaluation text, likewise.
        calibration_tokens: number of tokens used for calibration.
        evaluation_tokens: number of tokens used for evaluation.
        calibration_labels: "data" for the next tokens of the text, or "sampled" from the model; see `calibrate`.
        self_generated: number of tokens that the model generates beside the calibration text; see `calibrate`.
        context: tokens per window.
        share: the fraction of the training text to use, selected by the seed.
    """

    train: Texts | None = None
    calibration: Texts | None = None
    evaluation: Texts | None = None
    calibration_tokens: int = Field(default=16384, ge=1)
    evaluation_tokens: int = Field(default=16384, ge=1)
    calibration_labels: Labels = "data"
    self_generated: int = Field(default=0, ge=0)
    context: int = Field(default=1024, ge=2)
    share: float = Field(default=1.0, gt=0, le=1)


class Recipe(Checked):
    """A complete recipe.

    Attributes:
        name: a plain file name, which is also that of the default run folder.
        description: what the recipe does.
        source: the paper it follows.
        model: a folder, registered name or hub name; see `load_model`.
        dtype: the dtype of the weights.
        data: the texts.
        seed: the seed of all random generators.
        steps: (name, step) pairs in order.
    """

    name: str
    description: str = ""
    source: str = ""
    model: str
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    data: DataConfig = DataConfig()
    seed: int = Field(default=0, ge=0)
    steps: tuple[tuple[str, StepConfig], ...]

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if name in ("", ".", "..") or name != name.strip() or not name.isprintable() or set(name) & set("/\\:"):
            raise ValueError("must be a plain file name, since a run's folder is called by it")
        return name

    def sources(self) -> list[str]:
        """Returns the names of the model and of all texts."""
        texts = (self.data.train, self.data.calibration, self.data.evaluation)
        return [self.model, *(name for part in texts if part for name in ([part] if isinstance(part, str) else part))]

    @classmethod
    def from_dict(cls, form: Mapping[str, Any], place: str = "recipe") -> Recipe:
        """Returns a recipe from its YAML form.

        Raises:
            RecipeError: when the form is invalid; lists all faults.
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
        """Returns the YAML form, without options that have their default."""
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


@dataclass
class Run:
    """The state of a run, passed to each step.

    Attributes:
        recipe: the recipe.
        model: the model after the steps so far.
        tokenizer: its tokenizer, or None.
        folder: the run folder; steps may write to it.
        console: for messages.
        device: the device of the model.
        results: the results of the finished steps, in order.
        kept_dense: the original model while the model has changed and a later step needs it; None otherwise.
    """

    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    folder: Path
    console: Console
    device: str | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    kept_dense: nn.Module | None = None
    _tokens: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _data: dict[str, Data] = field(default_factory=dict, init=False, repr=False)

    @property
    def dense(self) -> nn.Module:
        """The model before any step changed it; available until the last step that needs it."""
        return self.model if self.kept_dense is None else self.kept_dense

    def texts(self, part: Literal["train", "calibration", "evaluation"]) -> list[str]:
        """Load the documents of one part of the recipe's data.

        Raises:
            RecipeError: when the recipe names no such text; the message has the override that adds one.
            SourceError: when the text cannot be loaded; the message has the override that selects another.
        """
        name = getattr(self.recipe.data, part)
        if name is None:
            raise RecipeError(f"recipe '{self.recipe.name}' names no {part} text: add data.{part}=PATH")
        try:
            found = load_texts(name)
        except SourceError as error:
            raise SourceError(f"{error} (in a recipe: data.{part}=PATH)") from None
        tokens = getattr(self.recipe.data, f"{part}_tokens", None)
        said = name if isinstance(name, str) else " + ".join(name)
        self._data[part] = Data(part, said, tokens, sha256(found))
        return found

    @property
    def data(self) -> tuple[Data, ...]:
        """The texts that were loaded so far."""
        return tuple(self._data.values())

    def keep_record(self, record: Record, name: str) -> None:
        """Write the record of a compression of the current step to the run folder; only the main process does.

        Args:
            name: of the file, behind the number of the step.
        """
        path = self.folder / RECORDS / f"{len(self.results) + 1:02}-{name}.json"
        on_main_process(lambda: _ignore(record.save(path)))

    def calibration(self, resolved: Resolved) -> Calibration | None:
        """Calibrate the weights that a policy replaces on the calibration text; returns None if there are none.

        Raises:
            RecipeError: when the recipe names no calibration text.
        """
        if not resolved.rewritten:
            return None
        context, tokens = self.recipe.data.context, self.recipe.data.self_generated
        batches: Sequence[Batch] = torch.split(windows(self.tokens("calibration"), context), 1)
        if tokens:
            batches = with_self_generated(resolved.model, batches, tokens, context=context)
        return calibrated(resolved, batches, labels=self.recipe.data.calibration_labels)

    def tokens(self, part: Literal["calibration", "evaluation"]) -> Tensor:
        """Returns the token ids (n,), int64, of a part of the data, limited as in the recipe; cached."""
        if part not in self._tokens:
            self._tokens[part] = encode(self.texts(part), self.tokenizer, getattr(self.recipe.data, f"{part}_tokens"))
        return self._tokens[part]

    def check_windows(self, part: Literal["calibration", "evaluation"]) -> None:
        """Check that a part of the data fills a window of ``data.context`` tokens, and that the model accepts it.

        Raises:
            RecipeError: when the recipe names no such text.
            SourceError: when the text or tokenizer is missing, or the window is too long for the text or the model.
        """
        check_positions(self.model, self.recipe.data.context)
        windows(self.tokens(part), self.recipe.data.context)


def _ignore(_: object) -> None:
    return None
