"""Progress of long work: what is done, what came of it so far, how long it still takes. A bar on terminals.

rich is imported when a bar is created, because its import is slow and draws from Python's global random state.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Mode = Literal["bar", "lines", "none"]

EVERY = 10.0  # seconds between two lines of one piece of work

_mode: list[Mode] = ["bar"]


def show_progress(mode: Mode) -> None:
    """Choose how work reports that is not told: a bar on terminals, lines on standard error, or not at all."""
    _mode[0] = mode


class Bar:
    """The progress of a loop, to be updated by it.

    Args:
        title: of the work.
        total: number of items; None when it is not known.
        work: the total of what `advance` is given as work; the time left is estimated by it, and by items when None.
    """

    def __init__(self, title: str, total: float | None, work: float | None = None) -> None:
        self.title = title
        self.total = total
        self.items = 0.0
        self.label = ""
        self.found = ""
        self._work, self._whole = 0.0, total if work is None else work
        self._before = 0.0  # of the work, done before the start
        self._by_items = work is None
        self._started = time.monotonic()

    def now(self, label: str) -> None:
        """Set the label of the current item."""
        self.label = label
        self._show()

    def so_far(self, found: str) -> None:
        """Set what came of the work so far, in words; it is shown with the next update."""
        self.found = found

    def advance(self, amount: float = 1, work: float | None = None) -> None:
        """Count `amount` items as done.

        Args:
            work: their part of the total work; `amount` when None.
        """
        self.items += amount
        self._work += amount if work is None or self._by_items else work
        self._show()

    def before(self, amount: float, work: float | None = None) -> None:
        """Count items that were done before; they tell nothing of the time that others take."""
        self._before += amount if work is None or self._by_items else work
        self.advance(amount, work)

    def done(self) -> str:
        """Returns the number of finished items, of the total where it is known."""
        return f"{self.items:g}" if self.total is None else f"{self.items:g}/{self.total:g}"

    def share(self) -> float | None:
        """Returns the finished share of the work; None when it is not known."""
        return min(self._work / self._whole, 1.0) if self._whole else None

    def elapsed(self) -> float:
        """Returns the seconds since the start."""
        return time.monotonic() - self._started

    def left(self) -> float | None:
        """Returns the seconds that the rest takes if it goes on as before; None when that is not known."""
        done = self._work - self._before
        return self.elapsed() * max(self._whole - self._work, 0.0) / done if self._whole and done > 0 else None

    def times(self) -> str:
        """Returns elapsed time and time left."""
        left = self.left()
        return clock(self.elapsed()) + ("" if left is None else f", {clock(left)} left")

    def _show(self) -> None:
        """Show the state."""


class _Drawn(Bar):
    """A bar on a terminal."""

    def __init__(self, progress: Progress, title: str, total: float | None, work: float | None) -> None:
        super().__init__(title, total, work)
        self._progress = progress
        self._task: TaskID = progress.add_task(title, total=None if total is None else 1.0, bar=self)

    def _show(self) -> None:
        self._progress.update(self._task, completed=self.share() or 0.0)


class _Written(Bar):
    """Lines on standard error, a few in a minute."""

    _last = 0.0

    def _show(self) -> None:
        now = time.monotonic()
        finished = self.total is not None and self.items >= self.total
        if self.items and (finished or now - max(self._last, self._started) >= EVERY):
            self._last = now
            parts = [f"{self.title} {self.done()}", self.times(), self.found, "" if finished else self.label]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


@contextmanager
def progress_bar(
    title: str, total: float | None, show: bool | None = None, *, work: float | None = None
) -> Iterator[Bar]:
    """A context manager that yields a bar on standard error: done, elapsed and remaining time, result, current item.

    Args:
        title: the text before the bar.
        total: the number of items; None when it is not known.
        show: whether to draw the bar; when None, as `show_progress` chose, by default on a terminal only.
        work: see `Bar`.
    """
    if show is False or (show is None and _mode[0] == "none"):
        yield Bar(title, total, work)
        return
    if show is None and _mode[0] == "lines":
        yield _Written(title, total, work)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, Task
    from rich.progress import ProgressColumn as Column
    from rich.text import Text

    class Says(Column):
        """What the bar says of itself, which changes with time too."""

        def render(self, task: Task) -> Text:
            bar: Bar = task.fields["bar"]
            parts = (bar.done(), bar.times(), bar.found, bar.label)
            return Text("  ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis")

    class Title(Column):
        """The title, without markup."""

        def render(self, task: Task) -> Text:
            return Text(task.description)

    console = Console(stderr=True)
    if not (console.is_terminal if show is None else show):
        yield Bar(title, total, work)
        return
    progress = Progress(Title(), BarColumn(20), Says(), console=console, transient=True)
    with progress:
        yield _Drawn(progress, title, total, work)


def clock(seconds: float) -> str:
    """Format a time as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
