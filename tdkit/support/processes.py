"""Work on many layers shared by the processes of ``torch.distributed``, one layer each in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import distributed

from tdkit.errors import TdkitError

T = TypeVar("T")
R = TypeVar("R")


def processes() -> tuple[int, int]:
    """The rank of this process and how many there are; (0, 1) where none were started together."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def shared(items: Sequence[T], work: Callable[[T], R]) -> Iterator[R]:
    """``work(item)`` for every item in order, each done by one process and sent to the others.

    As many items as there are processes are worked on at once, so no more results than that wait. Results
    must be picklable: they pass between the processes of one run, never through a file.

    Raises:
        TdkitError: in every process, when the work of one of them failed.
    """
    rank, count = processes()
    if count == 1:
        yield from map(work, items)
        return
    for first in range(0, len(items), count):
        own = first + rank
        outcome: tuple[R | None, Exception | None] = (None, None)
        if own < len(items):
            try:
                outcome = work(items[own]), None
            except Exception as failure:
                outcome = None, failure
        outcomes: list[tuple[R, Exception | None]] = [outcome] * count  # type: ignore[list-item]
        distributed.all_gather_object(outcomes, outcome)
        for place, (_, error) in enumerate(outcomes):
            if error is not None:
                raise error if isinstance(error, TdkitError) else TdkitError(f"process {place} failed: {error!r}")
        yield from (result for result, _ in outcomes[: len(items) - first])
