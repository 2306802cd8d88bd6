"""What commands print: a table for people on standard output, or JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from tdkit.support.plain import say

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show what would be done, and stop.")]
Device = Annotated[str | None, typer.Option(help="Where to compute, such as cuda; the CPU by default.")]

PIPED_WIDTH = 140  # a file or a pipe has no width of its own


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # what is printed holds names and prompts of the user's, which are no markup
    return Console(stderr=stderr, markup=False, emoji=False, width=None if stream.isatty() else PIPED_WIDTH)


out = _console(stderr=False)
err = _console(stderr=True)


def note(text: str) -> None:
    """Tell a person something on standard error, which programs do not read."""
    say(err, text)


def show(table: RenderableType, data: Any, as_json: bool) -> None:
    """Print `data` as JSON, or the table; a text is printed as it is, however long its lines."""
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    elif isinstance(table, str):
        typer.echo(table)
    else:
        out.print(table)
