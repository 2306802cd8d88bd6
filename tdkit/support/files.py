"""Atomic writes of files and folders: completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A context manager that yields a temporary folder, which replaces `folder` if the block raises nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    target = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield target
        for path in target.rglob("*"):
            if path.is_file():
                _to_disk(path)
        target.chmod(0o755)
        if folder.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.rename(aside / "old")
            try:
                target.rename(folder)
            except BaseException:
                (aside / "old").rename(folder)
                raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        else:
            target.rename(folder)
    finally:
        shutil.rmtree(target, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A context manager that yields a temporary path to write to, which replaces `path` if the block raises nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    target = Path(name)
    try:
        yield target
        _to_disk(target)
        target.chmod(0o644)
        target.replace(path)
    finally:
        target.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file completely or not at all."""
    with whole_file(path) as target:
        target.write_text(text, encoding="utf-8")


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
