"""Carrying out a recipe step by step, with a run folder from which an interrupted run goes on."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from tdkit.errors import RecipeError
from tdkit.models.checkpoint import load, save
from tdkit.models.huggingface import is_transformers
from tdkit.recipes.recipe import Recipe, Run
from tdkit.sources.models import DTYPES, load_model
from tdkit.sources.source import Source
from tdkit.support.files import write_text

STATE = "state.json"

RECIPE_FILE = "recipe.yaml"


def run_recipe(
    recipe: Recipe,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Carry out a recipe's steps; after each the run folder holds all that is needed to go on from there.

    Args:
        recipe: from `load_recipe`.
        folder: of the run; ``runs/NAME`` when None.
        resume: go on after the last finished step of an earlier run of the same recipe in `folder`.
        overwrite: discard an earlier run in `folder`.
        device: where the model runs.

    Returns:
        One dictionary per step: its kind, seconds and figures.

    Raises:
        RecipeError: when the folder holds another run; the steps raise their own errors.
    """
    folder = Path("runs") / recipe.name if folder is None else Path(folder)
    console = console or Console(stderr=True)
    finished, results = _open_folder(folder, recipe, resume, overwrite)
    source, dense = _open_model(recipe, folder, finished, device)
    run = Run(recipe, source.model, source.tokenizer, folder, console, device, results, dense)
    for number, (kind, step) in enumerate(recipe.steps):
        if number < finished:
            console.print(f"[dim]step {number + 1}/{len(recipe.steps)} {kind}: done before[/dim]")
            continue
        console.print(f"[bold]step {number + 1}/{len(recipe.steps)} {kind}[/bold] {step.outline()}")
        if step.changes_model and run.kept_dense is None and _needs_dense(recipe, number):
            run.kept_dense = copy.deepcopy(run.model)
        torch.manual_seed(recipe.seed)
        started = time.perf_counter()
        figures = step.run(run)
        run.results.append({"step": kind, "seconds": round(time.perf_counter() - started, 1), **figures})
        if step.changes_model and number + 1 < len(recipe.steps):
            save(run.model, _after(folder, number + 1), tokenizer=run.tokenizer, overwrite=True)
        _write_state(folder, recipe, number + 1, run.results)
        _drop_older(folder, run.results, recipe)
        if not _needs_dense(recipe, number + 1):
            run.kept_dense = None
    return run.results


def _needs_dense(recipe: Recipe, start: int) -> bool:
    return any(step.needs_dense for _, step in recipe.steps[start:])


def _after(folder: Path, count: int) -> Path:
    return folder / f"after-step-{count}"


def _last_change(recipe: Recipe, finished: int) -> int:
    """How many steps had been done when the model last changed; 0 when it never did."""
    return max((n + 1 for n, (_, step) in enumerate(recipe.steps[:finished]) if step.changes_model), default=0)


def _open_folder(folder: Path, recipe: Recipe, resume: bool, overwrite: bool) -> tuple[int, list[dict[str, Any]]]:
    state = folder / STATE
    if state.is_file() and resume:
        try:
            form = json.loads(state.read_text(encoding="utf-8"))
            finished, results, earlier = int(form["finished"]), list(form["results"]), form["recipe"]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"{state} is damaged: {error}; start again with overwrite") from None
        if earlier != recipe.to_dict():
            raise RecipeError(
                f"{folder} holds a run of another recipe or other options: resume with the same, or give another folder"
            )
        return finished, results
    if folder.exists() and any(folder.iterdir()):
        if not state.is_file():
            raise RecipeError(f"{folder} holds other files: give another folder")
        if not overwrite:
            raise RecipeError(f"{folder} holds an earlier run: resume it, overwrite it, or give another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RECIPE_FILE, recipe.to_yaml())
    _write_state(folder, recipe, 0, [])
    return 0, []


def _open_model(recipe: Recipe, folder: Path, finished: int, device: str | None) -> tuple[Source, nn.Module | None]:
    changed = _last_change(recipe, finished)
    original = load_model(recipe.model, dtype=DTYPES[recipe.dtype], device=device)
    if changed == 0 or finished == len(recipe.steps):
        return original, None
    fresh = None if is_transformers(original.model) else copy.deepcopy(original.model)
    model = load(_after(folder, changed), model=fresh, device=device)
    dense = original.model if _needs_dense(recipe, finished) else None
    return Source(original.name, model, original.tokenizer), dense


def _write_state(folder: Path, recipe: Recipe, finished: int, results: list[dict[str, Any]]) -> None:
    state = {"recipe": recipe.to_dict(), "finished": finished, "results": results}
    write_text(folder / STATE, json.dumps(state, indent=2) + "\n")


def _drop_older(folder: Path, results: list[dict[str, Any]], recipe: Recipe) -> None:
    """Remove the checkpoints that a resumed run would not read."""
    keep = _after(folder, _last_change(recipe, len(results)))
    for place in folder.glob("after-step-*"):
        if place != keep or len(results) == len(recipe.steps):
            shutil.rmtree(place, ignore_errors=True)
