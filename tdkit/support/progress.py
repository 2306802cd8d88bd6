"""A progress bar that shows itself only where a person is looking.

rich is imported when a bar is made: it takes time, and a draw from Python's global random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """What a running bar lets its loop say."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def now(self, label: str) -> None:
        """Name what is being worked on."""
        self._progress.update(self._task, label=label)

    def advance(self, amount: float = 1) -> None:
        """Count `amount` as done."""
        self._progress.advance(self._task, amount)


@contextmanager
def progress_bar(title: str, total: float, show: bool | None = None) -> Iterator[Bar]:
    """A bar on standard error with what is being done, how far it is and the time left.

    Args:
        show: None shows it on a terminal only.
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
