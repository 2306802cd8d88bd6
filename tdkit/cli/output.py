"""What commands print: a table for people on standard output, or JSON for programs; notes go to standard error."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show what would be done, and stop.")]
Device = Annotated[str | None, typer.Option(help="Where to compute, such as cuda; the CPU by default.")]

PIPED_WIDTH = 140  # a file or a pipe has no width of its own


@dataclass(frozen=True)
class Command:
    """A function that is a command.

    Attributes:
        function: its arguments and options are those of the command, its docstring the help.
        example: a call that the help shows, and that a test runs.
        own: one for a torch model of the user's, by import path.
    """

    function: Callable[..., None]
    example: str
    own: str | None = None

    @property
    def examples(self) -> list[str]:
        return [each for each in (self.example, self.own) if each is not None]

    @property
    def name(self) -> str:
        return self.function.__name__.rstrip("_").replace("_", "-")


@dataclass
class Settings:
    """The options before the command.

    Attributes:
        debug: show tracebacks.
        quiet: print results and errors only.
        verbose: report the progress of long work also where no bar can be drawn.
        kept: what Ctrl-C leaves of the running command's work, and how to go on.
    """

    debug: bool = False
    quiet: bool = False
    verbose: bool = False
    kept: str = ""


settings = Settings()


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # what is printed holds names and prompts of the user's, which are no markup
    return Console(stderr=stderr, markup=False, emoji=False, width=None if stream.isatty() else PIPED_WIDTH)


out = _console(stderr=False)
err = _console(stderr=True)


def note(text: str) -> None:
    """Tell a person something on standard error, which programs do not read."""
    if not settings.quiet:
        err.print(Text(text))


def complain(what: str, text: str) -> None:
    """Print an error on standard error, each line as long as it is."""
    err.print(Text(f"{what}: ", style="bold red"), end="", soft_wrap=True)
    err.print(Text(text), soft_wrap=True)


def show(table: RenderableType, data: Any, as_json: bool) -> None:
    """Print `data` as JSON, or the table; a text is printed as it is, however long its lines."""
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    elif isinstance(table, str):
        typer.echo(table)
    else:
        out.print(table)


BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


IMPORTED = ("torchao", "torch.utils._pytree", "torch.onnx._internal.exporter._registration")
"""Loggers that warn, on import, of kernels for other devices that torchao cannot load, and of torchvision's absence."""


def without_import_warnings() -> None:
    """Leave out warnings about the import of other packages that concern nothing that tdkit uses."""
    for name in IMPORTED:
        logging.getLogger(name).setLevel(logging.ERROR)


def without_foreign_bars() -> None:
    """Turn the progress bars of other libraries off, for what they load later, as tdkit's are where none can be drawn.

    They are set in the environment, for libraries that are not imported yet and for the processes of workers.
    """
    for name in BARS:
        os.environ.setdefault(name, "1")
