"""A progress bar, by default shown on terminals only.

rich is imported when a bar is created, because its import is slow and draws from Python's global random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """A running progress bar, to be updated by the loop."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def now(self, label: str) -> None:
        """Set the label of the current item."""
        self._progress.update(self._task, label=label)

    def advance(self, amount: float = 1) -> None:
        """Advance the bar by `amount`."""
        self._progress.advance(self._task, amount)


@contextmanager
def progress_bar(title: str, total: float | None, show: bool | None = None) -> Iterator[Bar]:
    """A context manager that yields a bar on standard error with title, progress, times and current item.

    Args:
        title: the text before the bar.
        total: the amount at which the bar is full; None when it is not known.
        show: whether to show the bar; when None, only on a terminal.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    visible = console.is_terminal if show is None else show
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[label]}", markup=False),
        console=console,
        disable=not visible,
        transient=True,
    )
    with progress:
        yield Bar(progress, progress.add_task(title, total=total, label=""))
