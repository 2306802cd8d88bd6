"""Atomic writes of files and folders: completely or not at all, also when the process is killed."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tdkit.errors import TdkitError, WriteError
from tdkit.support.compatibility import exchange_paths

# Temporary names say who writes them: machine and process; the earlier content of NAME is set aside under ".NAME-old-".
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A context manager that yields a temporary folder, which replaces `folder` if the block raises nothing.

    The two folders are exchanged in one step where the system can do that (Linux and macOS, on most file systems).
    Elsewhere the earlier one is renamed first: if the process is killed in between, the next call puts it back. What
    a killed process has left is removed by the next call for the same folder.

    Raises:
        WriteError: when the system or safetensors cannot write; what was there is unchanged.
    """
    target = _name(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover(folder)
        target.mkdir()
        try:
            yield target
            for path in target.rglob("*"):
                if path.is_file():
                    _to_disk(path)
            if not folder.exists():
                target.rename(folder)
            elif not exchange_paths(target, folder):
                _replace(folder, target)
            _folder_to_disk(folder.parent)
        finally:
            shutil.rmtree(target, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A context manager that yields a temporary path to write to, which replaces `path` if the block raises nothing.

    Raises:
        WriteError: as `whole_folder`.
    """
    target = _name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        target.touch(exist_ok=False)
        try:
            yield target
            _to_disk(target)
            target.replace(path)
            _folder_to_disk(path.parent)
        finally:
            with suppress(OSError):
                target.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file completely or not at all."""
    with whole_file(path) as target:
        target.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context manager that raises `WriteError`, which names `path`, for what the system or safetensors refuses."""
    try:
        yield
    except TdkitError:  # some are OSErrors too
        raise
    except (OSError, SafetensorError) as error:
        raise WriteError(
            f"{path} cannot be written ({error}): free some space, or give another place. What was there is unchanged"
        ) from error


def digest_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_folder(what: str, place: str | Path | None = None) -> Path:
    """Make a folder in the temporary folder, or in `place`; those that killed processes left there are removed.

    Raises:
        WriteError: as `whole_folder`.
    """
    base = Path(tempfile.gettempdir() if place is None else place)
    path = base / f"tdkit-{what}"
    made = _name(path)
    with writing(made):
        base.mkdir(parents=True, exist_ok=True)
        recover(path)
        made.mkdir(mode=0o700)
    return made


@contextmanager
def scratch_folder(what: str, place: str | Path | None = None) -> Iterator[Path]:
    """A context manager that yields a `temporary_folder`, and removes it."""
    made = temporary_folder(what, place)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def recover(path: Path) -> None:
    """Put back what a killed process had set aside for `path`, and remove what it had begun to write."""
    if not path.parent.is_dir():
        return
    left = re.compile(rf"\.{re.escape(path.name)}-(old-)?([0-9a-f]{{8}})-([0-9]+)-[0-9a-f]{{8}}")
    found = [(entry, left.fullmatch(entry.name)) for entry in path.parent.iterdir() if entry.name.startswith(".")]
    for entry, match in found:
        if match is None or match[2] != _HOST or _is_alive(int(match[3])):
            continue
        if match[1] and not path.exists():
            entry.rename(path)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _replace(folder: Path, target: Path) -> None:
    """Rename the earlier folder, then the new one."""
    aside = _name(folder, "old-")
    folder.rename(aside)
    try:
        target.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _name(path: Path, what: str = "") -> Path:
    return path.with_name(f".{path.name}-{what}{_HOST}-{os.getpid()}-{secrets.token_hex(4)}")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to someone else
        return True
    return True


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    """Make the names in a folder durable, on systems whose folders can be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse
        pass
    finally:
        os.close(handle)
