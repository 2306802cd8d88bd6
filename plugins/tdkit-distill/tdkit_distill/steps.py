"""The kinds of recipe steps that this package adds: distill, heal, untie, reinitialize."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from tdkit.errors import RecipeError
from tdkit.models.checkpoint import load
from tdkit.models.ties import follow_ties
from tdkit.recipes.recipe import Recipe, Run, StepConfig
from tdkit.sources.models import load_model
from torch import Tensor, nn

from tdkit_distill.data.examples import Examples
from tdkit_distill.data.labelled import divide, labelled_rows, read_labelled
from tdkit_distill.data.order import mixed_seed
from tdkit_distill.data.text import Objective, text_windows
from tdkit_distill.healing.heal import heal
from tdkit_distill.healing.settings import MEASUREMENTS, PATIENCE, RANK, TOP_K, Method
from tdkit_distill.loop.engine import distill
from tdkit_distill.loop.measure import accuracy
from tdkit_distill.loop.stages import Options, Running, Stage, count_of
from tdkit_distill.models.transfer import take_weights
from tdkit_distill.teachers.cache import CachedTeacher, build_cache


class Reading(Options):
    """How the training text becomes rows.

    Attributes:
        objective: ``causal``, ``masked`` or ``masked_pairs`` language modelling, or ``labels`` for a classifier.
        length: tokens per row; the recipe's ``data.context`` when None.
        held_out: rows put aside by the seed, to measure on and never train on.
        limit: tokens to read at most.
        streaming: read a hub dataset as a stream.
        column, labels: of the dataset.
        cache: folder of packed windows.
    """

    objective: Objective | Literal["labels"] = "causal"
    length: int | None = Field(default=None, ge=2)
    held_out: int = Field(default=32, ge=0)
    limit: int | str | None = None
    streaming: bool = True
    column: str = "text"
    labels: str = "label"
    cache: str | None = None


class Offline(Options):
    """Keep the teacher's logits instead of running it.

    Attributes:
        k: logits per position.
        temperature: of the loss that reads them.
        folder: of the cache, to share it between runs; inside the run folder when None.
    """

    k: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    folder: str | None = None


class DistillStep(Stage, StepConfig):
    """One stage of distillation from the model as it was before any step changed it.

    Attributes:
        teacher: ``dense`` for that model, ``none``, or the name or folder of another one.
        text: how ``data.train`` becomes rows.
        running: precision, checkpoints, compilation; see `Running`.
        offline: compute the teacher's logits once, before training.
        start: a saved folder, such as that of a general stage, whose weights the student takes before it is
            trained. Layers that both have must agree in factors and shapes; heads may differ (`take_weights`).
    """

    changes_model: ClassVar[bool] = True
    needs_dense: ClassVar[bool] = True
    teacher: str = "dense"
    text: Reading = Reading()
    running: Running = Running()
    offline: Offline | None = None
    start: str | None = None

    def check(self, recipe: Recipe) -> None:
        if recipe.data.train is None:
            raise RecipeError("distill needs a text to train on: add data.train=PATH or a datasets name")

    def run(self, run: Run) -> dict[str, Any]:
        number = len(run.results) + 1
        seed = mixed_seed(run.recipe.seed, "step", number)
        rows, held_out = self._rows(run)
        if self.start is not None:
            for line in take_weights(run.model, load(self.start), self.start).lines(self.start):
                run.console.print(f"  {line}", markup=False, highlight=False)
        teacher = self._teacher(run, rows, number)
        running = self.running
        if run.device is not None and running.device is None:
            running = running.model_copy(update={"device": torch.device(run.device).type})
        stage = Stage.model_validate({name: getattr(self, name) for name in Stage.model_fields})
        folder = run.folder / f"distill-{number}"
        done = distill(run.model, teacher, stage, rows, folder=folder, held_out=held_out, seed=seed, running=running)
        if run.device is None:
            run.model.cpu()
        figures: dict[str, Any] = {"optimizer_steps": done.steps, "tokens": done.tokens, "resumed_at": done.resumed_at}
        figures["terms"] = next((e["terms"] for e in reversed(done.history) if "terms" in e), {})
        if done.held_out is not None:
            figures["held_out_loss"] = done.held_out
            figures["held_out_perplexity"] = math.exp(done.held_out) if done.held_out < 700 else math.inf
        if self.text.objective == "labels" and held_out is not None:
            figures["accuracy"] = accuracy(run.model, held_out)
            if isinstance(teacher, nn.Module):
                figures["teacher_accuracy"] = accuracy(teacher, held_out)
        told = {k: v for k, v in figures.items() if isinstance(v, float)}
        run.console.print(f"  {done.steps} steps, {done.tokens:,} tokens", markup=False, highlight=False)
        run.console.print(
            "  " + ", ".join(f"{name} {value:.4g}" for name, value in told.items()), markup=False, highlight=False
        )
        return figures

    def _rows(self, run: Run) -> tuple[Examples, Examples | None]:
        data, text = run.recipe.data, self.text
        assert data.train is not None
        length = text.length or data.context
        if text.objective == "labels":
            texts, labels = read_labelled(data.train, column=text.column, labels=text.labels)
            table = labelled_rows(texts, labels, run.tokenizer, length=length)
            return divide(table, text.held_out, run.recipe.seed) if text.held_out else (table, None)
        packed = text_windows(
            data.train,
            run.tokenizer,
            length=length,
            share=data.share,
            held_out=text.held_out,
            limit=count_of(text.limit),
            seed=run.recipe.seed,
            objective=text.objective,
            streaming=text.streaming,
            column=text.column,
            cache=text.cache,
        )
        if not len(packed.held_out):
            return packed.train, None
        return packed.train, packed.held_out_examples()

    def _teacher(self, run: Run, rows: Examples, number: int) -> nn.Module | CachedTeacher | None:
        if self.teacher == "none":
            return None
        model = run.dense if self.teacher == "dense" else load_model(self.teacher).model
        if self.offline is None:
            return model
        folder = Path(self.offline.folder) if self.offline.folder else run.folder / f"teacher-{number}"
        return build_cache(model, rows, folder, k=self.offline.k, temperature=self.offline.temperature)


class HealStep(StepConfig):
    """Healing by the model as it was before any step changed it, on ``data.train``; the options are those of `heal`."""

    changes_model: ClassVar[bool] = True
    needs_dense: ClassVar[bool] = True
    tokens: int | str = "200k"
    self_generated: int | str = 0
    method: Method = "all"
    learning_rate: float | None = None
    batch_size: int | None = None
    losses: dict[str, Any] | None = None
    held_out: str | None = None
    others: list[str] | None = None
    rank: int = RANK
    top_k: int | None = TOP_K
    measurements: int = MEASUREMENTS
    patience: int | None = PATIENCE
    precision: Literal["auto", "no", "bf16"] = "auto"

    def check(self, recipe: Recipe) -> None:
        if recipe.data.train is None:
            raise RecipeError("heal needs a text to train on: add data.train=PATH or a datasets name")
        if recipe.data.share < 1:
            raise RecipeError(
                f"heal takes its windows from all of data.train, and data.share is {recipe.data.share:g}: leave it "
                "out, and say by tokens how much is trained on"
            )

    def run(self, run: Run) -> dict[str, Any]:
        def say(text: str) -> None:
            run.console.print(f"  {text}", markup=False, highlight=False)

        number = len(run.results) + 1
        options: dict[str, Any] = {name: getattr(self, name) for name in HealStep.model_fields}
        assert run.recipe.data.train is not None
        done = heal(
            run.model,
            run.dense,
            run.recipe.data.train,
            tokenizer=run.tokenizer,
            context=run.recipe.data.context,
            device=None if run.device is None else torch.device(run.device).type,
            folder=run.folder / f"heal-{number}",
            seed=mixed_seed(run.recipe.seed, "step", number),
            say=say,
            **options,
        )
        for name, after in done.after.perplexity.items():
            say(f"perplexity of {name}: {after:.4g} after {done.before.perplexity[name]:.4g}")
        return {
            "tokens": done.measurements[-1].tokens,
            "kept_at": done.after.tokens,
            "perplexity_before": done.before.perplexity,
            "perplexity": done.after.perplexity,
            "warnings": done.warnings,
        }


class UntieStep(StepConfig):
    """Give a language model's head a dense weight of its own, so that compressing the embedding leaves it alone."""

    changes_model: ClassVar[bool] = True

    def run(self, run: Run) -> dict[str, Any]:
        untie(run.model)
        return {"params": sum(p.numel() for p in run.model.parameters())}


class ReinitializeStep(StepConfig):
    """Draw new random weights for the model by the recipe's seed, to train from scratch."""

    changes_model: ClassVar[bool] = True

    def run(self, run: Run) -> dict[str, Any]:
        config = getattr(run.model, "config", None)
        if config is None:
            raise RecipeError(f"reinitialize: {type(run.model).__name__} is built from no config")
        device = next(run.model.parameters()).device
        run.model = type(run.model)(config).to(device).eval()
        return {"params": sum(p.numel() for p in run.model.parameters())}


def untie(model: nn.Module) -> None:
    """Copy the tied head of a transformers model, in place, and say so in its config.

    Raises:
        RecipeError: when the model has no head of its own to untie.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise RecipeError(f"untie: {type(model).__name__} has no output embedding")
    config: Any = model.config
    for name, parameter in list(head.named_parameters(recurse=False)):  # the bias is tied too where there is one
        setattr(head, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    config.tie_word_embeddings = False
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            if isinstance(getattr(module, attribute, None), dict):
                setattr(module, attribute, {})
    follow_ties(model)
