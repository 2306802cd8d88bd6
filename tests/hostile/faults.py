"""Kill a process before any change it makes to files, or let the change fail, and look at what is left."""

from __future__ import annotations

import errno
import io
import os
import re
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdkit.errors import TdkitError
from tdkit.support import files

CHANGES = ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync")

LEFT = re.compile(r"\..*-(old-)?[0-9a-f]{8}-[0-9]+-[0-9a-f]{8}|after-step-.*|.*\.work|tdkit-.*")


@dataclass(frozen=True)
class Operation:
    """Something that writes files.

    Attributes:
        prepare: makes what is there before.
        act: the operation; called again, it finishes what an earlier call had begun.
        check: raises an AssertionError unless what is there is whole: that before, or that after; called with True
            only after a call that came to its end.
    """

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    check: Callable[[Path, bool], object]


@contextmanager
def interposed(call: Callable[[str, str], None]) -> Iterator[None]:
    """A context manager inside which ``call(name, path)`` runs before every change of the file system by Python."""
    before: dict[str, Any] = {name: getattr(os, name) for name in CHANGES}
    exchange, opened = files.exchange_paths, io.open

    def wrapped(name: str) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            call(name, str(arguments[0]))
            return before[name](*arguments, **options)

        return changed

    def exchanged(first: Path, second: Path) -> bool:
        call("exchange", str(first))
        return exchange(first, second)

    def written(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            call("write", str(file))
        return opened(file, mode, *arguments, **options)

    for name in CHANGES:
        setattr(os, name, wrapped(name))
    files.exchange_paths, io.open = exchanged, written
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(os, name, function)
        files.exchange_paths, io.open = exchange, opened


def in_child(folder: Path, work: Callable[[], object]) -> tuple[int, str]:
    """Run `work` in a child; returns 0, 3 for a `TdkitError`, 4 for another exception, or minus a signal, and a text.

    The temporary folder of the child is ``tmp`` beside `folder`.
    """
    reading, writing = os.pipe()  # no file, which a full disk would not take
    (folder.parent / "tmp").mkdir(exist_ok=True)
    child = os.fork()
    if not child:
        code = 4
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            tempfile.tempdir = str(folder.parent / "tmp")
            signal.alarm(120)
            work()
            code = 0
        except TdkitError as error:
            _say(writing, str(error))
            code = 3
        except BaseException:
            _say(writing, traceback.format_exc()[-2500:])
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said


def _say(pipe: int, text: str) -> None:
    os.write(pipe, text[-2500:].encode("utf-8", "replace"))


class Scene:
    """An operation in a folder of its own, prepared once and copied for each try."""

    def __init__(self, place: Path, operation: Operation) -> None:
        self.place, self.operation = place, operation
        self.whole = place / "whole"
        self.whole.mkdir(parents=True)
        operation.prepare(self.whole)

    def changes(self) -> int:
        """Returns how many changes of the file system the operation makes."""
        counted = self.place / "count"
        folder = self._fresh()

        def work() -> None:
            seen: list[str] = []
            with interposed(lambda name, _: seen.append(name)):
                self.operation.act(folder)
            counted.write_text(str(len(seen)))

        code, said = in_child(folder, work)
        if code:
            raise AssertionError(f"the operation fails by itself: {said}")
        self.operation.check(folder, True)
        return int(counted.read_text())

    def killed(self, number: int) -> str | None:
        """Kill the operation before change `number` and call it again; returns what is wrong, or None."""
        folder, seen = self._fresh(), 0

        def die(*_: str) -> None:
            nonlocal seen
            seen += 1
            if seen > number:
                os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            with interposed(die):
                self.operation.act(folder)

        code, said = in_child(folder, work)
        if code not in (0, -signal.SIGKILL):
            return f"before the kill: {said}"
        return self._whole(folder, False) or self._again(folder)

    def fails(self, number: int, error: int) -> str | None:
        """Let change `number` and all later ones but removals fail; returns what is wrong, or None."""
        folder, seen = self._fresh(), 0

        def fail(name: str, path: str) -> None:
            nonlocal seen
            seen += 1
            if seen > number and name not in ("unlink", "rmdir") and str(self.place) in path:
                raise OSError(error, os.strerror(error), path)

        def work() -> None:
            with interposed(fail):
                self.operation.act(folder)

        code, said = in_child(folder, work)
        if code not in (0, 3) or (code == 3 and not said.strip()):
            return f"a raw error ({code}): {said}"
        return self._whole(folder, False) or self._again(folder)

    def full(self, size: int) -> str | None:
        """Let every file that grows beyond `size` bytes fail, as on a full disk; returns what is wrong, or None."""
        folder = self._fresh()

        def work() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            self.operation.act(folder)

        code, said = in_child(folder, work)
        if code not in (0, 3) or (code == 3 and not said.strip()):
            return f"a raw error ({code}): {said}"
        return self._whole(folder, False) or self._again(folder)

    def twice(self) -> str | None:
        """Run two at once; returns what is wrong, or None."""
        folder = self._fresh()
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            code, said = in_child(folder, lambda: self.operation.act(folder))
            if code not in (0, 3):
                _say(writing, said or f"it ends with {code}")
            os._exit(0)
        os.close(writing)
        code, said = in_child(folder, lambda: self.operation.act(folder))
        with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
            other = pipe.read()
        os.waitpid(child, 0)
        if other or code not in (0, 3):
            return f"a raw error of one of two: {other or said}"
        return self._whole(folder, False) or self._again(folder)

    def _again(self, folder: Path) -> str | None:
        code, said = in_child(folder, lambda: self.operation.act(folder))
        if code:
            return f"the next call fails: {said}"
        left = [str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*") if LEFT.fullmatch(path.name)]
        return self._whole(folder, True) or (f"left over: {left}" if left else None)

    def _whole(self, folder: Path, ended: bool) -> str | None:
        try:
            self.operation.check(folder, ended)
        except BaseException:
            return (
                f"not whole {'after the next call' if ended else 'after the fault'}: {traceback.format_exc()[-1500:]}"
            )
        return None

    def _fresh(self) -> Path:
        folder = self.place / "try" / "folder"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(self.whole, folder)
        return folder


ERRORS = {"disk full": errno.ENOSPC, "read-only": errno.EROFS}
