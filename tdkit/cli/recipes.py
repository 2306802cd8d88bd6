"""``tdkit recipes``, ``show``, ``copy``, ``validate`` and ``run``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdkit.cli.completion import complete_recipes
from tdkit.cli.options import NoReport
from tdkit.cli.output import AsJson, Command, Device, DryRun, err, note, out, settings, show

if TYPE_CHECKING:
    from tdkit.recipes.recipe import Recipe

Name = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A registered recipe, or a .yaml file.", autocompletion=complete_recipes),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as model=PATH or data.context=512.")
]


def recipes(as_json: AsJson = False) -> None:
    """List the recipes and the packages they come from."""
    from tdkit.recipes.library import recipe_files
    from tdkit.support.documents import parse_yaml
    from tdkit.support.tables import table_of

    rows, data = [], []
    for name, files in recipe_files().items():
        owners = [owner for owner, _ in files]
        form = parse_yaml(files[0][1].read_text(encoding="utf-8"))
        entry = {
            "name": name,
            "model": form.get("model", ""),
            "description": form.get("description", ""),
            "source": form.get("source", ""),
            "packages": owners,
        }
        rows.append([name, entry["model"], entry["description"], " and ".join(owners)])
        data.append(entry)
    table = table_of("recipes", ["name", "model", "what it does", "package"], rows)
    for column in table.columns:
        column.justify = "left"
    show(table, data, as_json)


def show_(name: Name, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print a recipe as YAML, with overrides applied."""
    from tdkit.recipes.library import load_recipe, recipe_text

    if not overrides and not as_json:
        typer.echo(recipe_text(name), nl=False)
        return
    recipe = load_recipe(name, overrides or ())
    show(recipe.to_yaml().rstrip(), recipe.to_dict(), as_json)


def copy(
    name: Name,
    target: Annotated[Path | None, typer.Argument(help="File to write; NAME.yaml here by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe to a file of your own, to edit and run."""
    from tdkit.errors import RecipeError
    from tdkit.recipes.library import recipe_text
    from tdkit.support.files import write_text

    text = recipe_text(name)
    target = target or Path(f"{Path(name).stem}.yaml")
    if target.exists() and not force:
        raise RecipeError(f"{target} exists: give another file, or --force")
    write_text(target, text)
    note(f"wrote {target}")


def validate(name: Name, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe and report every fault of it."""
    from tdkit.recipes.library import load_recipe

    recipe = load_recipe(name, overrides or ())
    show(f"{name} is valid: {len(recipe.steps)} steps", {"name": recipe.name, "valid": True}, as_json)


def run(
    name: Name,
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option("--out", help="The run's folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished step.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard an earlier run in the folder.")] = False,
    device: Device = None,
    no_report: NoReport = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe, and leave a report."""
    from tdkit.cli.reports import leave_report
    from tdkit.recipes.library import load_recipe
    from tdkit.recipes.run import default_folder, run_recipe
    from tdkit.support.devices import check_device
    from tdkit.support.processes import is_main_process

    recipe = load_recipe(name, overrides or ())
    check_device(device)
    if dry_run:
        show(_outline(recipe), recipe.to_dict(), as_json)
        return
    console = err if as_json or settings.quiet else out
    console.quiet = settings.quiet
    try:
        results = run_recipe(recipe, folder, resume=resume, overwrite=overwrite, device=device, console=console)
    except KeyboardInterrupt:
        settings.kept = _kept(folder or default_folder(recipe), len(recipe.steps))
        raise
    finally:
        console.quiet = False
    if not no_report and is_main_process():
        leave_report(folder or default_folder(recipe))
    if as_json:
        show("", results, as_json)


def _kept(folder: Path, count: int) -> str:
    """Says how many steps of an interrupted run are finished, and the call that goes on after them."""
    from tdkit.recipes.run import finished_steps

    finished = finished_steps(folder)
    if finished is None:
        return "the run had not begun"
    call = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
    again = shlex.join(["tdkit", *call, "--resume"])
    return f"{finished} of {count} steps had finished and are kept in {folder}: {again} goes on after them"


def _outline(recipe: Recipe) -> str:
    lines = [f"{recipe.name}: model {recipe.model}, seed {recipe.seed}"]
    lines += [f"  {number}. {kind} {step.outline()}" for number, (kind, step) in enumerate(recipe.steps, 1)]
    return "\n".join(lines)


COMMANDS = (
    Command(recipes, "tdkit recipes"),
    Command(show_, "tdkit show smollm2-demo data.context=256"),
    Command(copy, "tdkit copy smollm2-demo mine.yaml"),
    Command(validate, "tdkit validate mine.yaml data.context=256"),
    Command(run, "tdkit run smollm2-demo --out runs/demo"),
)
