"""The command line: the commands, and how errors become exit codes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from tdkit.cli import (
    bench,
    calibration,
    decompositions,
    doctor,
    evaluate,
    export,
    models,
    plugins,
    recipes,
    report,
    sources,
    sweep,
)
from tdkit.cli.commands import command_of, commands, listed
from tdkit.cli.output import complain, err, settings, without_foreign_bars, without_import_warnings
from tdkit.errors import BudgetError, OptionError, PolicyError, RecipeError, RegistryError, TdkitError
from tdkit.support.plugins import check_installed
from tdkit.support.progress import show_progress
from tdkit.support.version import VERSION

USAGE_ERRORS = (OptionError, PolicyError, BudgetError, RegistryError, RecipeError)

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ends


class Commands(TyperGroup):
    """The commands, those of other packages too; Ctrl-C in one of them says what is left of its work."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *commands.names()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        return listed(cmd_name) if own is None and cmd_name in commands.names() else own

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in {*self.commands, *commands.names()}:
            check_installed(args[0])
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name in self.commands else command_of(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted", f"nothing half-written is left; {settings.kept or 'the same call starts anew'}")
            sys.exit(INTERRUPTED)


app = typer.Typer(
    name="tdkit",
    cls=Commands,
    help="Compress PyTorch models by tensor decompositions: look at a plan, compress, evaluate, run a recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: tdkit plan smollm2 --with low_rank --budget 0.9",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tdkit {VERSION}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Report progress in lines where no bar can be drawn.")
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if quiet and verbose:
        raise OptionError("--quiet and --verbose contradict each other: give one of them")
    settings.debug, settings.quiet, settings.verbose, settings.kept = debug, quiet, verbose, ""
    show_progress("none" if quiet else "lines" if verbose and not err.is_terminal else "bar")
    if not verbose:
        without_import_warnings()
    if quiet or not err.is_terminal:
        without_foreign_bars()


GROUPS = (
    decompositions,
    sources,
    recipes,
    models,
    calibration,
    evaluate,
    sweep,
    report,
    export,
    bench,
    doctor,
    plugins,
)

for group in GROUPS:
    for command in group.COMMANDS:
        shown = "\n\n".join(f"Example: {escape(each)}" for each in command.examples)
        app.command(command.name, epilog=shown)(command.function)


def main() -> None:
    """Run the command line; exit with 2 for what the user can mend in the call, 1 for a failed run, 130 for Ctrl-C."""
    try:
        app()
    except TdkitError as error:
        if settings.debug:
            raise
        complain("error", str(error))
        sys.exit(2 if isinstance(error, USAGE_ERRORS) else 1)
    except Exception as error:
        if settings.debug:
            raise
        complain("error", f"{type(error).__name__}: {error}\nRun with --debug before the command for the traceback.")
        sys.exit(1)
