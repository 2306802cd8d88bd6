"""``tdkit recipes``, ``show``, ``copy``, ``validate`` and ``run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from tdkit.cli.output import AsJson, Device, DryRun, err, note, out, show
from tdkit.cli.report import NoReport, leave_report
from tdkit.errors import RecipeError
from tdkit.recipes.library import load_recipe, recipe_files, recipe_text
from tdkit.recipes.recipe import Recipe
from tdkit.recipes.run import run_recipe
from tdkit.support.devices import check_device
from tdkit.support.files import write_text
from tdkit.support.processes import is_main_process
from tdkit.support.tables import table_of

Name = Annotated[str, typer.Argument(metavar="RECIPE", help="A registered recipe, or a .yaml file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as model=PATH or data.context=512.")
]


def recipes(as_json: AsJson = False) -> None:
    """List the recipes and the packages they come from."""
    rows, data = [], []
    for name, files in recipe_files().items():
        owners = [owner for owner, _ in files]
        form = yaml.safe_load(files[0][1].read_text(encoding="utf-8"))
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
    text = recipe_text(name)
    target = target or Path(f"{Path(name).stem}.yaml")
    if target.exists() and not force:
        raise RecipeError(f"{target} exists: give another file, or --force")
    write_text(target, text)
    note(f"wrote {target}")


def validate(name: Name, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe and report every fault of it."""
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
    """Run a recipe and leave a report: [bold]tdkit run smollm2-demo[/bold]."""
    recipe = load_recipe(name, overrides or ())
    check_device(device)
    if dry_run:
        show(_outline(recipe), recipe.to_dict(), as_json)
        return
    console = err if as_json else out
    results = run_recipe(recipe, folder, resume=resume, overwrite=overwrite, device=device, console=console)
    if not no_report and is_main_process():
        leave_report(Path("runs") / recipe.name if folder is None else folder)
    if as_json:
        show("", results, as_json)


def _outline(recipe: Recipe) -> str:
    lines = [f"{recipe.name}: model {recipe.model}, seed {recipe.seed}"]
    lines += [f"  {number}. {kind} {step.outline()}" for number, (kind, step) in enumerate(recipe.steps, 1)]
    return "\n".join(lines)


COMMANDS = (recipes, show_, copy, validate, run)
