"""The command line: the commands, and how errors become exit codes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import tdkit
from tdkit.cli import bench, calibration, evaluate, export, models, recipes, sources
from tdkit.cli import decompositions as registered
from tdkit.cli.plugins import command_of, commands
from tdkit.errors import BudgetError, OptionError, PolicyError, RecipeError, RegistryError, TdkitError
from tdkit.support.plugins import check_installed

USAGE_ERRORS = (OptionError, PolicyError, BudgetError, RegistryError, RecipeError)

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ends


class Commands(TyperGroup):
    """The commands, those of other packages too; Ctrl-C in one of them says what is left of its work."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *commands.names()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        if cmd_name in commands.names():
            return command_of(cmd_name)
        check_installed(cmd_name)
        return None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            text = "nothing half-written is left"
            if ctx.invoked_subcommand == "run":
                text += ", and the steps that had finished are kept: the same call with --resume goes on after them"
            _say("interrupted", text)
            sys.exit(INTERRUPTED)


app = typer.Typer(
    name="tdkit",
    cls=Commands,
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

for group in (registered, sources, recipes, models, calibration, evaluate, export, bench):
    for command in group.COMMANDS:
        app.command(command.__name__.rstrip("_"))(command)


def main() -> None:
    """Run the command line; exit with 2 for what the user can mend in the call, 1 for a failed run, 130 for Ctrl-C."""
    try:
        app()
    except TdkitError as error:
        if settings["debug"]:
            raise
        _say("error", str(error))
        sys.exit(2 if isinstance(error, USAGE_ERRORS) else 1)
    except Exception as error:
        if settings["debug"]:
            raise
        _say("error", f"{type(error).__name__}: {error}\nRun with --debug before the command for the traceback.")
        sys.exit(1)


def _say(what: str, text: str) -> None:
    typer.secho(f"{what}: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(text, err=True)
