"""One process at a time writes a cache, whether the others belong to the same run or to another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from tdkit_distill.errors import StorageError


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder while the context is open; other processes that ask for it wait.

    The lock is a file beside the folder, ``.NAME.lock``, which stays there. The operating system releases it when a
    process dies, so that an error, a signal or Ctrl-C in the process that writes leaves none waiting.

    Raises:
        StorageError: when there can be no such file.
    """
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise StorageError(f"{folder} cannot be locked to write it ({error}): give another cache folder") from error
    try:
        yield
    finally:
        lock.release()
