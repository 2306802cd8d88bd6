"""Pieces of work that several processes share through lock files, so that each is done by one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tdkit.support.files import writing

if TYPE_CHECKING:
    from filelock import FileLock

T = TypeVar("T")

PAUSE = 0.2  # seconds between two looks at what other processes do


@contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path` inside the block; yields whether this process got it.

    The operating system releases the lock when a process ends, also when it is killed. The file stays. No process gets
    it when its folder is removed meanwhile.

    Args:
        wait: wait until other processes release it; otherwise yield False at once.

    Raises:
        WriteError: when the file cannot be made.
    """
    from filelock import FileLock  # comes with torch

    lock = FileLock(path)
    with writing(path):
        mine = _acquired(lock, wait)
    if not mine:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _acquired(lock: FileLock, wait: bool) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(timeout=-1 if wait else 0)
    except (Timeout, FileNotFoundError):  # the latter when another process has removed the folder
        return False
    return True


def shared_by_claims(
    items: Sequence[T], place: Callable[[T], Path], work: Callable[[T], None], *, over: Callable[[], bool]
) -> Iterator[T]:
    """Iterate over `items` as they get done, each by the process that claims it; other processes do the same.

    An item whose process is killed is done by another one.

    Args:
        place: the file that an item is done by, which `work` writes as a whole.
        work: does an item.
        over: whether other processes have finished everything and removed the files, which ends the iteration.
    """
    left = list(items)
    while left and not over():
        others = []
        for item in left:
            path = place(item)
            if not path.exists():
                with claimed(path.with_name(f"{path.name}.lock"), wait=False) as mine:
                    if not mine:
                        others.append(item)
                        continue
                    if over():
                        return
                    if not path.exists():
                        work(item)
            yield item
        left = others
        if left:
            time.sleep(PAUSE)
