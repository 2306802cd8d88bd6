"""The progress display of a run (stage, loss terms, tokens per second, time left), and its log file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tdkit.support.documents import parse_json
from tdkit.support.files import write_text

from tdkit_distill.errors import StorageError

if sys.platform != "win32":
    import fcntl


LOG = "log.jsonl"


class LiveView:
    """A progress bar for the steps of a stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=1, terms="", speed="")

    def stage(self, title: str, steps: int, done: int) -> None:
        """Begin a stage of `steps`, of which `done` were done before the run was resumed."""
        self._progress.reset(self._task, total=steps, completed=done, description=title, terms="", speed="")

    def step(self, terms: Mapping[str, float], tokens_per_second: float) -> None:
        """Count one step."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
        self._progress.update(self._task, advance=1, terms=text, speed=f"{tokens_per_second:,.0f} tok/s")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)


@contextmanager
def live_view(show: bool | None = None) -> Iterator[LiveView]:
    """A live view on standard error; None shows it on a terminal only."""
    console = Console(stderr=True)
    visible = console.is_terminal if show is None else show
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}", markup=False),
    )
    with Progress(*columns, console=console if visible else Console(quiet=True), disable=not visible) as progress:
        yield LiveView(progress)


class Log:
    """One JSON object per optimizer step, appended to ``log.jsonl`` in the run's folder and kept in memory.

    Each has the seconds that the run has taken until then, under ``clock``; those of an interrupted run count up to
    the checkpoint that it went on from.

    Args:
        folder: None keeps it in memory only.
        total: steps that a resumed run had done; what was written after them is dropped.
    """

    def __init__(self, folder: Path | None, total: int) -> None:
        self.entries: list[dict[str, Any]] = []
        self._file = None
        self._held: int | None = None  # the folder, as long as this process trains in it
        self._started, self._before = time.perf_counter(), 0.0
        if folder is None:
            return
        self._held = _held(folder)
        path = folder / LOG
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            self.entries = [entry for entry in map(_parsed, lines) if entry is not None and entry["total"] <= total]
        self._before = max((entry.get("clock", 0.0) for entry in self.entries), default=0.0)
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
        self._file = path.open("a", encoding="utf-8")

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry."""
        entry = {**entry, "clock": round(self._before + time.perf_counter() - self._started, 2)}
        self.entries.append(entry)
        self._write(entry)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):  # a full disk has been told when the entry was written
                self._file.close()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps(entry) + "\n")
                self._file.flush()
            except OSError as error:
                raise StorageError(
                    f"{self._file.name} could not be written ({error}): free some space and run again to go on from "
                    "the last checkpoint"
                ) from error


def _held(folder: Path) -> int | None:
    """Returns the folder, opened and locked for this process until it is closed; None where there are no such locks.

    Raises:
        StorageError: when another process trains in it.
    """
    if sys.platform == "win32":
        return None
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise StorageError(
            f"another process trains in {folder}: wait until it has ended, or give another folder"
        ) from None
    except OSError:  # a file system without locks
        os.close(opened)
        return None
    return opened


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = parse_json(line)
    except ValueError:  # the last line of a run that was killed while it wrote
        return None
    return entry if isinstance(entry, dict) and type(entry.get("total")) is int else None
