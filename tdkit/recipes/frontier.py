"""The recipe step that compresses a model to several sizes, with and without rounding, and goes on with one of them."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, field_validator
from torch import nn

from tdkit.compression.apply import compress_resolved
from tdkit.errors import RecipeError
from tdkit.evaluation.language_models import PROTOCOL, Evaluation, evaluate
from tdkit.fitting.quantization import check_torchao
from tdkit.models.quantization import quantize
from tdkit.planning.planner import applied_plan, planned
from tdkit.planning.policy import Policy
from tdkit.planning.resolution import resolve
from tdkit.recipes.figures import FIGURE_COLUMNS, figure_row, measurements, of_run
from tdkit.recipes.recipe import Recipe, Run, StepConfig
from tdkit.recipes.steps import RuleForms, check_calibration
from tdkit.records.before import Before
from tdkit.records.record import Record
from tdkit.records.tree import tree_of
from tdkit.support.plain import say
from tdkit.support.tables import table_of


class FrontierStep(StepConfig):
    """Compress the model to each of several sizes and measure it, also with its weights rounded to integers.

    One calibration, and one error curve of each weight, serve all sizes. The dense model is measured beside them, and
    rounded like them, so that the table shows what each byte costs either way.

    Attributes:
        rules: the rules of the policy in their YAML form; see `Policy`.
        budgets: params after / params before of the whole model, of each size.
        keep: the budget of the model that the next steps go on with.
        bits: bits per number, 8 or 4, to which the dense model and each size are rounded as well; needs torchao.
        calibrated: calibrate on the calibration text and fit in that metric.
        allocation: see `Policy`.
    """

    changes_model: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    rules: RuleForms
    budgets: tuple[float, ...] = Field(min_length=1)
    keep: float
    bits: tuple[int, ...] = ()
    calibrated: bool = False
    allocation: str = "auto"

    @field_validator("bits")
    @classmethod
    def _bits_are_offered(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if wrong := [each for each in bits if each not in (4, 8)]:
            raise ValueError(f"{wrong[0]} bits are not offered: 8 or 4")
        return bits

    def policy(self, budget: float) -> Policy:
        """The policy of one size."""
        return Policy.from_dict({"rules": self.rules, "budget": budget, "allocation": self.allocation})

    def check(self, recipe: Recipe) -> None:
        if recipe.data.evaluation is None:
            raise RecipeError("frontier needs a text to judge by: add data.evaluation")
        if self.keep not in self.budgets:
            raise RecipeError(f"frontier: keep: {self.keep:g} is none of the budgets {list(self.budgets)}")
        if len(set(self.budgets)) < len(self.budgets):
            raise RecipeError(f"frontier: a budget stands twice in {list(self.budgets)}")
        for budget in self.budgets:
            _ = self.policy(budget)
        check_calibration(self.calibrated, recipe, "frontier")

    def check_model(self, run: Run) -> None:
        run.check_windows("evaluation")
        if self.calibrated:
            run.check_windows("calibration")
        if self.bits:
            check_torchao()

    def run(self, run: Run) -> dict[str, Any]:
        made = _Frontier(run, evaluate(run.model, run.tokens("evaluation"), context=run.recipe.data.context))
        for bits in self.bits:
            made.add_rounded(run.model, None, bits)
        resolved = resolve(run.model, self.policy(self.budgets[0]))
        started = time.perf_counter()
        calibration = run.calibration(resolved) if self.calibrated else None
        if calibration is not None:
            seconds = time.perf_counter() - started
            say(run.console, f"  calibrated on {run.recipe.data.calibration_tokens:,} tokens in {seconds:.0f} s")
        kept: nn.Module | None = None
        for budget in sorted(self.budgets, reverse=True):
            policy = self.policy(budget)
            resolved = resolve(copy.deepcopy(run.model), policy)
            chosen = planned(resolved, calibration)
            before, started = Before.of(resolved, chosen, calibration), time.perf_counter()
            model = compress_resolved(resolved.following(chosen), calibration, device=run.device)
            seconds = time.perf_counter() - started
            options = {"step": "frontier", "with": _named(policy), "budget": budget, "calibrated": self.calibrated}
            made.add(model, budget, before, policy, options, seconds)
            if budget == self.keep:
                kept = model
            for bits in self.bits:
                made.add_rounded(model, budget, bits, with_=_named(policy))
        assert kept is not None
        run.console.print(table_of("sizes of the whole model", FIGURE_COLUMNS, made.rows))
        said = f"perplexity over {made.dense.tokens:,} tokens: {PROTOCOL}"
        say(run.console, f"{said}; context {run.recipe.data.context}, seed {run.recipe.seed}", "dim")
        run.model = kept
        return {"rows": made.figures, "kept": f"{self.keep:g}"}


@dataclass
class _Frontier:
    """The rows of a frontier so far."""

    run: Run
    dense: Evaluation

    def __post_init__(self) -> None:
        self.rows = [figure_row("dense", self.dense, self.dense, None)]
        self.figures: list[dict[str, Any]] = [{"name": "dense", **self.dense.to_dict()}]

    def add(
        self, model: nn.Module, budget: float, before: Before, policy: Policy, options: dict[str, Any], seconds: float
    ) -> None:
        """Measure and record a compressed model."""
        measured = self._measured(model, f"{budget:g}", seconds)
        record = before.record(
            model,
            policy=policy,
            options=options,
            dense=measurements(self.dense),
            compressed=measurements(measured),
            seconds={"fit": round(seconds, 2)},
            **{**of_run(self.run), "name": f"{budget:g}"},
        )
        self.run.keep_record(record, f"frontier-{len(self.figures)}-{budget:g}")

    def add_rounded(self, model: nn.Module, budget: float | None, bits: int, *, with_: str = "dense") -> None:
        """Measure and record a copy of a model, rounded."""
        started = time.perf_counter()
        rounded = quantize(copy.deepcopy(model), 4 if bits == 4 else 8)
        seconds = time.perf_counter() - started
        name = f"{'dense' if budget is None else f'{budget:g}'}, {bits} bits"
        measured = self._measured(rounded, name, seconds)
        sizes = {"params": self.dense.params, "bytes": self.dense.bytes}
        record = Record(
            model=self.run.recipe.model,
            class_name=type(model).__name__,
            options={"step": "frontier", "with": f"{with_}, {bits} bits", "bits": bits, "budget": budget},
            plan=applied_plan(rounded),
            after=tuple(tree_of(rounded)),
            dense={**sizes, **measurements(self.dense)},
            compressed={"params": measured.params, "bytes": measured.bytes, **measurements(measured)},
            seconds={"round": round(seconds, 2)},
            seed=self.run.recipe.seed,
            data=self.run.data,
            name=name,
        )
        self.run.keep_record(record, f"frontier-{len(self.figures)}-{name.replace(', ', '-').replace(' ', '-')}")

    def _measured(self, model: nn.Module, name: str, seconds: float) -> Evaluation:
        recipe = self.run.recipe
        measured = evaluate(model, self.run.tokens("evaluation"), context=recipe.data.context)
        self.rows.append(figure_row(name, measured, self.dense, seconds))
        say(self.run.console, f"  {name}: perplexity {self.rows[-1][4]}, {seconds:.0f} s")
        self.figures.append({"name": name, **measured.to_dict(), "fit_seconds": round(seconds, 2)})
        return measured


def _named(policy: Policy) -> str:
    """The decompositions of a policy, by name."""
    found = dict.fromkeys(rule.decomposition.name for rule in policy.rules if rule.decomposition is not None)
    return " + ".join(found)
