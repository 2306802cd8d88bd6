"""What commands print: a table for people on standard output, or JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show what would be done, and stop.")]
Device = Annotated[str | None, typer.Option(help="Where to compute, such as cuda; the CPU by default.")]

PIPED_WIDTH = 140  # a file or a pipe has no width of its own

out = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else PIPED_WIDTH)


def show(table: RenderableType, data: Any, as_json: bool) -> None:
    """Print `data` as JSON, or the table."""
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        out.print(table)
