"""The built-in recipe steps: compress, compare, evaluate, generate, save."""

from __future__ import annotations

import copy
import re
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, ConfigDict, Field, field_validator
from torch import Tensor, nn

from tdkit.compression.apply import compress, compress_resolved
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import CheckpointError, RecipeError
from tdkit.evaluation.language_models import PROTOCOL, evaluate
from tdkit.evaluation.samples import check_continues, continued
from tdkit.models.card import Card
from tdkit.models.checkpoint import load, save
from tdkit.models.huggingface import is_transformers
from tdkit.models.shards import same_bits
from tdkit.models.sites import num_params
from tdkit.planning.plan import Plan
from tdkit.planning.planner import plan, planned
from tdkit.planning.policy import Policy
from tdkit.planning.resolution import resolve
from tdkit.planning.rule import Rule
from tdkit.recipes.figures import FIGURE_COLUMNS, figure_row, measurements, of_run
from tdkit.recipes.recipe import RECIPE_FILE, RECORDS, STATE, Recipe, Run, StepConfig
from tdkit.records.before import Before
from tdkit.support.plain import say
from tdkit.support.processes import on_main_process
from tdkit.support.tables import table_of


def _checked(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    Policy.from_dict({"rules": rules})
    return rules


RuleForms = Annotated[list[dict[str, Any]], AfterValidator(_checked)]
"""The rules of a policy in their YAML form."""


class CompressStep(StepConfig):
    """Compress the model with a policy.

    Attributes:
        rules: the rules of the policy in their YAML form; see `Policy`.
        budget: see `Policy`.
        allow_growth: see `Policy`.
        allocation: see `Policy`.
        calibrated: calibrate on the calibration text and fit in that metric.
        sequential: fit block by block, see `compress`; needs `calibrated`.
        passes: the number of fits, see `compress`; more than one needs `calibrated`.
    """

    changes_model: ClassVar[bool] = True
    rules: RuleForms
    budget: float | dict[str, Any] | None = None
    allow_growth: bool = False
    allocation: str = "auto"
    calibrated: bool = False
    sequential: bool = False
    passes: int = Field(default=1, ge=1)

    @property
    def policy(self) -> Policy:
        """The policy that the options describe."""
        return Policy.from_dict(self.model_dump(include={"rules", "budget", "allow_growth", "allocation"}))

    def check(self, recipe: Recipe) -> None:
        _ = self.policy
        check_calibration(self.calibrated, recipe, "compress")
        if self.sequential and not self.calibrated:
            raise RecipeError("compress with sequential needs calibrated: true")
        if self.passes > 1 and not self.calibrated:
            raise RecipeError(f"compress with passes: {self.passes} needs calibrated: true")

    def check_model(self, run: Run) -> None:
        if self.calibrated:
            run.check_windows("calibration")

    def run(self, run: Run) -> dict[str, Any]:
        resolved = resolve(run.model, self.policy)
        calibration = run.calibration(resolved) if self.calibrated else None
        chosen = planned(resolved, calibration)
        run.console.print(chosen)
        before, started = Before.of(resolved, chosen, calibration), time.perf_counter()
        compress_resolved(
            resolved.following(chosen) if self.passes == 1 else resolved,
            calibration,
            sequential=self.sequential,
            passes=self.passes,
            device=run.device,
        )
        seconds = {"fit": round(time.perf_counter() - started, 2)}
        own = {"calibrated": self.calibrated, "sequential": self.sequential, "passes": self.passes}
        record = before.record(
            run.model, policy=self.policy, options={"step": "compress", **own}, seconds=seconds, **of_run(run)
        )
        run.keep_record(record, "compress")
        after = num_params(run.model)
        return {"params_before": chosen.params_before, "params_after": after, "ratio": after / chosen.params_before}


class CompareStep(StepConfig):
    """Compress the model with each of several decompositions at the same budget and keep the best result.

    The plan of the first decomposition determines the size of every layer, by estimated loss if the step is
    calibrated. The others use the same sizes, so that the table compares only the decompositions.

    Attributes:
        match: globs of the layers to compress; other layers stay dense.
        budget: params after / params before of the whole model.
        candidates: the decompositions; ``with`` in YAML.
        calibrated: calibrate on the calibration text and fit in that metric.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    changes_model: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    match: list[str]
    budget: float = Field(gt=0, le=1)
    candidates: list[str | dict[str, Any]] = Field(alias="with", min_length=1)
    calibrated: bool = False

    @field_validator("candidates")
    @classmethod
    def _are_decompositions(cls, candidates: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        for candidate in candidates:
            decomposition(candidate)
        return candidates

    @property
    def policy(self) -> Policy:
        """The policy of the first decomposition, which determines the sizes."""
        return Policy([Rule(glob, decomposition(self.candidates[0])) for glob in self.match], budget=self.budget)

    def check(self, recipe: Recipe) -> None:
        if recipe.data.evaluation is None:
            raise RecipeError("compare needs a text to judge by: add data.evaluation")
        check_calibration(self.calibrated, recipe, "compare")

    def check_model(self, run: Run) -> None:
        run.check_windows("evaluation")
        if self.calibrated:
            run.check_windows("calibration")

    def run(self, run: Run) -> dict[str, Any]:
        kinds = [decomposition(candidate) for candidate in self.candidates]
        ids = run.tokens("evaluation")
        context = run.recipe.data.context
        dense = evaluate(run.model, ids, context=context)
        rows = [figure_row("dense", dense, dense, None)]
        figures: list[dict[str, Any]] = [{"name": "dense", **dense.to_dict()}]
        policy = self.policy
        started = time.perf_counter()
        resolved = resolve(run.model, policy)
        calibration = run.calibration(resolved) if self.calibrated else None
        first = planned(resolved, calibration)
        if calibration is not None:
            seconds = time.perf_counter() - started
            say(run.console, f"  calibrated on {run.recipe.data.calibration_tokens:,} tokens in {seconds:.0f} s")
        run.console.print(first)
        best: tuple[float, nn.Module] | None = None
        best_name = ""
        for kind in kinds:
            started = time.perf_counter()
            chosen = first if kind is kinds[0] else plan(run.model, _same_sizes(first, kind), calibration=calibration)
            model = compress(copy.deepcopy(run.model), chosen, calibration=calibration, device=run.device)
            seconds = time.perf_counter() - started
            measured = evaluate(model, ids, context=context)
            before = Before.of(resolved.following(chosen), chosen, calibration)
            record = before.record(
                model,
                policy=_same_sizes(first, kind),
                options={"step": "compare", "with": kind.name, "budget": self.budget, "calibrated": self.calibrated},
                dense=measurements(dense),
                compressed=measurements(measured),
                seconds={"fit": round(seconds, 2)},
                **{**of_run(run), "name": f"{run.recipe.name}, {kind.name}"},
            )
            run.keep_record(record, f"compare-{len(figures)}-{kind.name}")
            rows.append(figure_row(kind.describe().removesuffix("()"), measured, dense, seconds))
            say(run.console, f"  {rows[-1][0]}: perplexity {rows[-1][4]}, {seconds:.0f} s")
            figures.append({"name": kind.name, **spec_of(kind), **measured.to_dict(), "fit_seconds": round(seconds, 2)})
            if best is None or measured.perplexity < best[0]:
                best, best_name = (measured.perplexity, model), f"{run.recipe.name}, {kind.name}"
        assert best is not None
        title = f"{', '.join(self.match)} at budget {self.budget:g} of the whole model"
        run.console.print(table_of(title, FIGURE_COLUMNS, rows))
        say(
            run.console,
            f"perplexity over {dense.tokens:,} tokens: {PROTOCOL}; context {context}, seed {run.recipe.seed}",
            "dim",
        )
        run.model = best[1]
        return {"rows": figures, "kept": best_name}


def _same_sizes(first: Plan, kind: Decomposition) -> Policy:
    """Returns a policy that gives every layer as many parameters as `first`, with another decomposition."""
    rules = [
        Rule(f"re:{re.escape(step.name)}", kind, budget=min(1.0, (step.params_after + 0.5) / step.params_before))
        for step in first.rewritten
    ]
    return Policy(rules, allocation="uniform")


def check_calibration(calibrated: bool, recipe: Recipe, step: str) -> None:
    """Raise `RecipeError` when a step is calibrated and the recipe names no calibration text."""
    if calibrated and recipe.data.calibration is None:
        raise RecipeError(f"{step} with calibrated needs a text to calibrate on: add data.calibration")


class EvaluateStep(StepConfig):
    """Measure perplexity, size and speed on the evaluation text, beside those of the model before any step."""

    needs_dense: ClassVar[bool] = True

    def check(self, recipe: Recipe) -> None:
        if recipe.data.evaluation is None:
            raise RecipeError("evaluate needs a text: add data.evaluation")

    def check_model(self, run: Run) -> None:
        run.check_windows("evaluation")

    def run(self, run: Run) -> dict[str, Any]:
        ids, context = run.tokens("evaluation"), run.recipe.data.context
        measured = evaluate(run.model, ids, context=context)
        if run.dense is run.model:
            run.console.print(table_of("evaluation", FIGURE_COLUMNS, [figure_row("dense", measured, measured, None)]))
            return measured.to_dict()
        dense = evaluate(run.dense, ids, context=context)
        rows = [figure_row("dense", dense, dense, None), figure_row(run.recipe.name, measured, dense, None)]
        run.console.print(table_of("evaluation", FIGURE_COLUMNS, rows))
        return {
            **measured.to_dict(),
            "ratio": measured.params / dense.params,
            "dense_params": dense.params,
            "dense_perplexity": dense.perplexity,
            "dense_tokens_per_second": dense.tokens_per_second,
        }


class GenerateStep(StepConfig):
    """Continue a prompt greedily with the model before and after compression.

    Attributes:
        prompt: the text to continue.
        tokens: the number of tokens to generate.
    """

    needs_dense: ClassVar[bool] = True
    prompt: str
    tokens: int = Field(default=24, ge=1)

    def check_model(self, run: Run) -> None:
        check_continues(run.model, run.tokenizer, "generate")

    def run(self, run: Run) -> dict[str, Any]:
        texts = {
            "dense": continued(run.dense, run.tokenizer, self.prompt, self.tokens),
            "compressed": continued(run.model, run.tokenizer, self.prompt, self.tokens),
        }
        for name, text in texts.items():
            say(run.console, f"  {name}: {text}")
        return texts


class SaveStep(StepConfig):
    """Save the model and, for transformers models, load it and check that its outputs are bit-identical.

    Attributes:
        folder: a path relative to the run folder.
    """

    saves_model: ClassVar[bool] = True
    folder: str = "model"

    def check(self, recipe: Recipe) -> None:
        place = Path(self.folder)
        if place.is_absolute() or ".." in place.parts or not place.parts:
            raise RecipeError(f"save.folder={self.folder!r} must lie inside the run folder")
        if place.parts[0] in (STATE, RECIPE_FILE, RECORDS, "report") or place.parts[0].startswith("after-step-"):
            raise RecipeError(f"save.folder={self.folder!r} is a name of the run's own files: give another")

    def run(self, run: Run) -> dict[str, Any]:
        return on_main_process(lambda: self._save(run))

    def _save(self, run: Run) -> dict[str, Any]:
        place = save(run.model, run.folder / self.folder, tokenizer=run.tokenizer, overwrite=True, card=_card(run))
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        if not is_transformers(run.model):
            say(run.console, f"  saved to {place}, {size / 1e6:.1f} MB on disk")
            return {"folder": str(place), "bytes_on_disk": size}
        again = load(place, device=run.device)
        ids = _probe(run)
        if not same_bits(_logits(run.model, ids).cpu(), _logits(again, ids).cpu()):
            raise CheckpointError(f"{place}: the reloaded model's outputs differ from the saved one's")
        say(run.console, f"  saved to {place}, {size / 1e6:.1f} MB on disk; reloaded, outputs identical")
        return {"folder": str(place), "bytes_on_disk": size, "reloaded_identical": True}


def _card(run: Run) -> Card:
    """Returns a model card with the recipe and the results of its last evaluation so far."""
    measured = [result for result in run.results if result["step"] == "evaluate"]
    figures = {**measured[-1], "text": str(run.recipe.data.evaluation)} if measured else None
    name = None if Path(run.recipe.model).exists() else run.recipe.model
    return Card(policy=run.recipe.to_yaml(), evaluation=figures, base_model=name)


def _probe(run: Run) -> Tensor:
    if run.recipe.data.evaluation is not None and run.tokenizer is not None:
        return run.tokens("evaluation")[: min(64, run.recipe.data.context)].unsqueeze(0)
    return torch.arange(16).unsqueeze(0)


@torch.inference_mode()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    training = model.training
    model.eval()
    output = model(ids.to(next(model.parameters()).device))
    model.train(training)
    first = output if isinstance(output, Tensor) else output[0]
    if not isinstance(first, Tensor):
        raise RecipeError(
            f"save compares the outputs of the saved and the reloaded model, and the first output of "
            f"{type(model).__name__} is a {type(first).__name__}, not a tensor"
        )
    return first
