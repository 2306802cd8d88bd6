"""Run many inputs in children of a warm process, each with a limit of time and of memory."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from tdkit.errors import TdkitError

SECONDS = 2.0
BYTES = 500 * 2**20
WAIT = 120.0  # seconds of silence after which a child is killed, on a busy machine too


@dataclass(frozen=True)
class Outcome:
    """What became of one input.

    Attributes:
        kind: "success", "error" (a `TdkitError`), "raw" (another exception), "slow", "large", or "crash".
        said: the message, or the traceback of a raw exception.
        seconds: of processor time that it took.
        bytes: by which the largest memory of the process grew.
        note: what the input was.
    """

    kind: str
    said: str
    seconds: float
    bytes: int
    note: str

    @property
    def good(self) -> bool:
        return self.kind in ("success", "error")


def run_all(inputs: Sequence[int], work: Callable[[int], str]) -> list[Outcome]:
    """Returns the outcome of ``work(input)`` for each input; it returns a note, or raises.

    A child does one input after the other; one that dies is replaced, and the input that it died of is a crash.
    """
    found: list[Outcome] = []
    while len(found) < len(inputs):
        found += _child(inputs[len(found) :], work)
    return found


def _child(inputs: Sequence[int], work: Callable[[int], str]) -> list[Outcome]:
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            _serve(inputs, work, writing)
        finally:
            os._exit(0)
    os.close(writing)
    found: list[Outcome] = []
    with os.fdopen(reading, "rb") as pipe:
        began = time.perf_counter()
        while True:
            ready, _, _ = select.select([pipe], [], [], WAIT)
            line = pipe.readline() if ready else b""
            if not line:
                os.kill(child, signal.SIGKILL)
                break
            found.append(Outcome(**json.loads(line)))
            began = time.perf_counter()
    _, status = os.waitpid(child, 0)
    if len(found) < len(inputs) and not (found and found[-1].kind == "large"):
        what = "hangs" if not ready else f"ends with status {status}"
        found.append(
            Outcome("crash", f"input {inputs[len(found)]}: the process {what}", time.perf_counter() - began, 0, "")
        )
    return found


def _serve(inputs: Sequence[int], work: Callable[[int], str], writing: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, _too_long)
    for each in inputs:
        outcome = measured(work, each)
        os.write(writing, (json.dumps(asdict(outcome)) + "\n").encode())
        if outcome.kind == "large":  # the next one starts from a small process
            return


class Late(BaseException):
    """The time is up."""


def _too_long(*_: object) -> None:
    raise Late


def measured(work: Callable[[int], str], each: int) -> Outcome:
    """Returns the outcome of one input, in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()  # of this process: other work on the machine is not counted
    signal.setitimer(signal.ITIMER_PROF, 5 * SECONDS)  # of processor time
    kind, said, note = "success", "", ""
    try:
        note = work(each)
    except TdkitError as error:
        kind, said = "error", str(error)
        note = " ".join(getattr(error, "__notes__", []))
        if not said.strip():
            kind, said = "raw", "an error without a message"
    except Late:
        kind = "slow"
    except BaseException as error:
        note = " ".join(getattr(error, "__notes__", []))
        kind, said = "raw", "".join(traceback.format_exception(error)[-4:])[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if kind in ("success", "error") and seconds > SECONDS:
        kind = "slow"
    if kind in ("success", "error") and grown > BYTES:
        kind = "large"
    return Outcome(kind, said[:1500], round(seconds, 3), grown, f"{each} {note}")
