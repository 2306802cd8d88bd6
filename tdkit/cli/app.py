"""The command line: the commands, and how errors become exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

import tdkit
from tdkit.cli import bench, models, recipes
from tdkit.cli import decompositions as registered
from tdkit.errors import BudgetError, OptionError, PolicyError, RecipeError, RegistryError, TdkitError

USAGE_ERRORS = (OptionError, PolicyError, BudgetError, RegistryError, RecipeError)

app = typer.Typer(
    name="tdkit",
    help="Compress PyTorch models by tensor decompositions: look at a plan, compress, evaluate, run a recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tdkit {tdkit.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    settings["debug"] = debug


settings = {"debug": False}

for group in (registered, recipes, models, bench):
    for command in group.COMMANDS:
        app.command(command.__name__.rstrip("_"))(command)


def main() -> None:
    """Run the command line; exit with 2 for what the user can mend in the call, 1 for a failed run."""
    try:
        app()
    except TdkitError as error:
        if settings["debug"]:
            raise
        _say(str(error))
        sys.exit(2 if isinstance(error, USAGE_ERRORS) else 1)
    except Exception as error:
        if settings["debug"]:
            raise
        _say(f"{type(error).__name__}: {error}\nRun with --debug before the command for the traceback.")
        sys.exit(1)


def _say(text: str) -> None:
    Console(stderr=True).print("[bold red]error:[/bold red] ", end="")
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(text)
