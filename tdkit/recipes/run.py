"""Run a recipe step by step, with a run folder from which an interrupted run can be resumed."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import distributed, nn

from tdkit.errors import RecipeError, SourceError, TdkitError, told_as
from tdkit.models.checkpoint import load, save
from tdkit.models.huggingface import is_transformers
from tdkit.recipes.recipe import RECIPE_FILE, STATE, Recipe, Run
from tdkit.sources.models import DTYPES, load_model
from tdkit.sources.source import Source
from tdkit.support.devices import check_device
from tdkit.support.documents import read_json, read_text
from tdkit.support.files import recover, whole_folder, write_text
from tdkit.support.plain import say
from tdkit.support.processes import failing_together, is_main_process, on_main_process


def run_recipe(
    recipe: Recipe,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Run the steps of a recipe; after each step the run folder contains everything needed to resume.

    Nothing is written, and an earlier run is not replaced, before the model is loaded and every step has been checked.
    The processes of a ``torch.distributed`` group run a recipe together: rank 0 prints and writes the run folder,
    which all must be able to read; an exception in one process stops all.

    Args:
        recipe: a recipe, such as one from `load_recipe`.
        folder: the run folder; ``runs/NAME`` when None.
        resume: continue after the last finished step of an earlier run of the same recipe in `folder`.
        overwrite: discard an earlier run in `folder`.
        device: the device of the model; the CPU when None.
        console: for messages; standard error when None.

    Returns:
        One dictionary per step: its name under "step", "seconds", and its results.

    Raises:
        OptionError: when the device is not available.
        RecipeError: when the folder holds another run or other files, or a step cannot run with the model.
        TdkitError: as raised by the steps.
    """
    check_device(device)
    _check_processes()
    folder = default_folder(recipe) if folder is None else Path(folder)
    console = (console or Console(stderr=True)) if is_main_process() else Console(quiet=True)
    with failing_together():
        earlier = on_main_process(lambda: _earlier(folder, recipe, resume, overwrite))
        finished, results = earlier or (0, [])
        if finished == len(recipe.steps):
            on_main_process(lambda: _drop_older(folder, results, recipe))  # a killed process may not have got to it
            for number, (kind, _) in enumerate(recipe.steps):
                say(console, f"{_title(recipe, number, kind)}: done before", "dim")
            return results
        if resume and earlier is None:
            say(console, f"{folder} holds no run to resume: starting with the first step")
        source, dense = _open_model(recipe, folder, finished, device)
        run = Run(recipe, source.model, source.tokenizer, folder, console, device, results, dense)
        _check_steps(run, finished)
        if earlier is None:
            on_main_process(lambda: _create(folder, recipe))
        for number, (kind, step) in enumerate(recipe.steps):
            if number < finished:
                say(console, f"{_title(recipe, number, kind)}: done before", "dim")
                continue
            say(console, f"{_title(recipe, number, kind)} {step.outline()}".rstrip(), "bold")
            if step.changes_model and run.kept_dense is None and _needs_dense(recipe, number):
                run.kept_dense = copy.deepcopy(run.model)
            torch.manual_seed(recipe.seed)
            started = time.perf_counter()
            with told_as(RecipeError, f"recipe '{recipe.name}': {_title(recipe, number, kind)} failed"):
                figures = step.run(run)
            done = {"step": kind, "seconds": round(time.perf_counter() - started, 1), **figures}
            run.results.append(on_main_process(done.copy))
            on_main_process(lambda: _keep(run))
            if not _needs_dense(recipe, number + 1):
                run.kept_dense = None
        return run.results


def default_folder(recipe: Recipe) -> Path:
    """Returns the folder of a run that is given none."""
    return Path("runs") / recipe.name


def finished_steps(folder: str | Path) -> int | None:
    """Returns how many steps of the run in a folder have finished; None if there is no run.

    Raises:
        RecipeError: when its state is damaged.
    """
    if not (Path(folder) / STATE).is_file():
        return None
    finished: int = _read_state(Path(folder))["finished"]
    return finished


def _check_processes() -> None:
    """Raise if torchrun started several processes without a process group: all would write to the same folder."""
    if distributed.is_available() and distributed.is_torchelastic_launched() and not distributed.is_initialized():
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1:
            raise RecipeError(
                f"torchrun started {count} processes that are not joined: call torch.distributed.init_process_group() "
                "before run_recipe, or start one process"
            )


def _title(recipe: Recipe, number: int, kind: str) -> str:
    return f"step {number + 1}/{len(recipe.steps)} {kind}"


def _check_steps(run: Run, finished: int) -> None:
    """Check that all remaining steps can run with the model, before the first of them runs."""
    problems = []
    for number, (kind, step) in enumerate(run.recipe.steps[finished:], finished):
        try:
            step.check_model(run)
        except TdkitError as error:
            problems += [f"steps.{number}.{kind}: {line}" for line in str(error).splitlines()]
    if problems:
        raise RecipeError("\n".join(f"recipe '{run.recipe.name}': {problem}" for problem in problems))


def _keep(run: Run) -> None:
    """Write what a resumed run needs: the model after the steps so far, and their results."""
    recipe, finished = run.recipe, len(run.results)
    if recipe.steps[finished - 1][1].changes_model:
        save(run.model, _after(run.folder, finished), tokenizer=run.tokenizer, overwrite=True)
    _write_state(run.folder, recipe, run.results)
    kept = _drop_older(run.folder, run.results, recipe)
    if kept is not None and finished == len(recipe.steps):
        say(run.console, f"  no step saved the last model: it is in {kept}")


def _needs_dense(recipe: Recipe, start: int) -> bool:
    return any(step.needs_dense for _, step in recipe.steps[start:])


def _after(folder: Path, count: int) -> Path:
    return folder / f"after-step-{count}"


def _last_change(recipe: Recipe, finished: int) -> int:
    """Returns the number of finished steps up to the last one that changed the model; 0 if none did."""
    return max((n + 1 for n, (_, step) in enumerate(recipe.steps[:finished]) if step.changes_model), default=0)


def _earlier(folder: Path, recipe: Recipe, resume: bool, overwrite: bool) -> tuple[int, list[dict[str, Any]]] | None:
    """Returns the number of finished steps and their results if a run is resumed, or None for a new run.

    Raises:
        RecipeError: when the folder holds files that must not be replaced, or a run that cannot be resumed.
    """
    recover(folder)
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise RecipeError(f"{folder} is a file: give a folder")
    for name in (RECIPE_FILE, STATE):  # what a killed process has begun to write
        recover(folder / name)
    if _is_empty(folder) or _holds_only(folder, RECIPE_FILE, recipe.to_yaml()):
        return None
    state = folder / STATE
    if not state.is_file() or not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"{folder} holds other files: give another folder")
    if resume:
        form = _read_state(folder)
        if form["recipe"] != recipe.to_dict():
            raise RecipeError(
                f"{folder} holds a run of another recipe or other options: resume with the same, or give another folder"
            )
        return form["finished"], form["results"]
    if not overwrite:
        raise RecipeError(f"{folder} holds an earlier run: resume it, overwrite it, or give another folder")
    _read_state(folder)
    place = folder.resolve()
    if Path.cwd().is_relative_to(place):
        raise RecipeError(f"{folder} is or holds the current folder and cannot be replaced: give another folder")
    for name in recipe.sources():
        if Path(name).resolve().is_relative_to(place):
            raise RecipeError(f"the recipe reads {name}, which lies in {folder}: it would be lost, give another folder")
    return None


def _read_state(folder: Path) -> dict[str, Any]:
    """Returns the validated state of a run.

    Raises:
        RecipeError: when the file is damaged, or was not written by a run.
    """
    path = folder / STATE
    try:
        form = read_json(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} is damaged: {error}: {_REMOVE_IT}") from None
    kinds = {"recipe": dict, "finished": int, "results": list}
    if not isinstance(form, dict) or not all(type(form.get(key)) is kind for key, kind in kinds.items()):
        raise RecipeError(f"{path} is no state of a run, or damaged: {_REMOVE_IT}")
    steps = form["recipe"].get("steps")
    if not isinstance(steps, list) or not 0 <= form["finished"] == len(form["results"]) <= len(steps):
        raise RecipeError(
            f"{path} is damaged: {form['finished']} finished steps with {len(form['results'])} results: {_REMOVE_IT}"
        )
    return form


_REMOVE_IT = "give another folder, or remove this one yourself"


def _create(folder: Path, recipe: Recipe) -> None:
    """Create the folder of a new run; it replaces an earlier one only once it is complete."""
    begun = _is_empty(folder) or _holds_only(folder, RECIPE_FILE, recipe.to_yaml())
    with nullcontext(folder) if begun else whole_folder(folder) as target:
        write_text(target / RECIPE_FILE, recipe.to_yaml())
        _write_state(target, recipe, [])


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _holds_only(folder: Path, name: str, text: str) -> bool:
    """Returns whether a folder holds one file with this text: a run that was killed before its first state."""
    try:
        return [path.name for path in folder.iterdir()] == [name] and read_text(folder / name) == text
    except (OSError, ValueError):
        return False


def _open_model(recipe: Recipe, folder: Path, finished: int, device: str | None) -> tuple[Source, nn.Module | None]:
    """Load the model after the finished steps, and the original model if a remaining step needs it (else None)."""
    changed = _last_change(recipe, finished)
    try:
        original = load_model(recipe.model, dtype=DTYPES[recipe.dtype], device=device)
    except SourceError as error:
        raise SourceError(f"{error} (in a recipe: model=PATH)") from None
    if changed == 0:
        return original, None
    fresh = None if is_transformers(original.model) else copy.deepcopy(original.model)
    model = load(_after(folder, changed), model=fresh, device=device)
    dense = original.model if _needs_dense(recipe, finished) else None
    return Source(original.name, model, original.tokenizer), dense


def _write_state(folder: Path, recipe: Recipe, results: list[dict[str, Any]]) -> None:
    state = {"recipe": recipe.to_dict(), "finished": len(results), "results": results}
    write_text(folder / STATE, json.dumps(state, indent=2) + "\n")


def _drop_older(folder: Path, results: list[dict[str, Any]], recipe: Recipe) -> Path | None:
    """Remove checkpoints that a resumed run does not need; returns the one that is kept, or None.

    That of the last step is kept if no later step saved the model.
    """
    last = _last_change(recipe, len(results))
    saved = any(step.saves_model for _, step in recipe.steps[last:])
    keep = None if last == 0 or (len(results) == len(recipe.steps) and saved) else _after(folder, last)
    for place in folder.glob("after-step-*"):
        if place != keep:
            shutil.rmtree(place, ignore_errors=True)
    return keep
