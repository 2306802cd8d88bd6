"""Work distributed over a ``torch.distributed`` group, whose processes all stop when one of them fails.

All messages between the processes go through `_exchange`: each holds the result of a process or its failure.
A process that fails, Ctrl-C included, takes part in one more exchange to send its failure. The others receive it in
their next exchange, whatever its purpose, and raise it too, so that none waits for a process that has stopped.
"""

from __future__ import annotations

import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from torch import distributed

from tdkit.errors import TdkitError

T = TypeVar("T")
R = TypeVar("R")

_alone = ContextVar("_alone", default=False)  # True inside on_main_process, where the other processes wait


def processes() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes; (0, 1) without ``torch.distributed``."""
    if _alone.get() or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_main_process() -> bool:
    """Returns whether this process has rank 0, which writes files and prints."""
    return processes()[0] == 0


def on_main_process(work: Callable[[], R]) -> R:
    """Run ``work()`` in the main process only and return its result in every process; the others wait for it.

    Inside `work` the main process behaves as the only process: `shared` does all the work itself, and a nested
    `on_main_process` only calls its argument. The result must be picklable; it is sent between the processes of one
    run, never through a file.

    Raises:
        TdkitError, KeyboardInterrupt: in every process, as in `failing_together`, when `work` raises.
    """
    rank, count = processes()
    if count == 1:
        return work()
    return _exchange(lambda: _by_itself(work) if rank == 0 else None)[0]  # type: ignore[return-value]


@contextmanager
def failing_together() -> Iterator[None]:
    """A context manager that propagates an exception of one process to all: a block completes in all or in none.

    The other processes raise it at their next exchange or at the end of the block. `KeyboardInterrupt` and picklable
    exceptions of tdkit are raised with their own type, all others as a `TdkitError` that names the process. Blocks may
    be nested. With a single process the block simply runs.

    The processes must enter the same blocks in the same order, and must use ``torch.distributed`` inside them only
    through this module. Otherwise a process could stop in another collective operation while the others wait here.
    """
    if processes()[1] == 1:
        yield
        return
    try:
        yield
    except BaseException as error:
        if not _known_to_all(error):
            _tell(error)
        raise
    _exchange(lambda: None)


def shared(items: Sequence[T], work: Callable[[T], R]) -> Iterator[R]:
    """Iterate over ``work(item)`` for all items in order, each computed by one process and sent to the others.

    Each round computes one item per process, so that at most that many results are in memory. Results
    must be picklable; they are sent between the processes of one run, never through a file.

    Iterate inside `failing_together`: otherwise the other processes wait forever when the body of the loop raises.

    Raises:
        TdkitError, KeyboardInterrupt: in every process, when `work` raises in one of them.
    """
    rank, count = processes()
    if count == 1:
        yield from map(work, items)
        return
    for first in range(0, len(items), count):
        mine = items[first + rank : first + rank + 1]
        results = _exchange(lambda: list(map(work, mine)))  # noqa: B023, called at once
        for each in results:
            yield from each


@dataclass(frozen=True)
class _Failure:
    """The message about an exception that stopped a process; not every exception can be pickled.

    Attributes:
        text: the ``repr`` of the exception.
        interrupted: whether it is a `KeyboardInterrupt`.
        error: the pickled exception if it is a picklable `TdkitError`, else None.
    """

    text: str
    interrupted: bool
    error: bytes | None


def _exchange(work: Callable[[], R]) -> list[R]:
    """Run `work` and gather its results from all processes, in the order of their ranks.

    Raises:
        BaseException: in every process when `work` raises in one: its own exception, or as in `failing_together`.
    """
    rank, count = processes()
    own: BaseException | None = None
    try:
        message = pickle.dumps((work(), None))
    except BaseException as error:
        own = error
        message = pickle.dumps((None, _failure_of(error)))
    messages: list[Any] = [None] * count
    with _interrupts_delayed():  # between gather and raise, an interrupt would start another exchange
        try:
            distributed.all_gather_object(messages, message)
        except BaseException as lost:  # such as a killed process: no further exchange is possible
            raise _marked(lost) from own
        outcomes = [pickle.loads(each) for each in messages]
        failures = {place: failure for place, (_, failure) in enumerate(outcomes) if failure is not None}
        if failures:
            raise _marked(_to_raise(failures, rank, own))
    return [result for result, _ in outcomes]


def _to_raise(failures: dict[int, _Failure], rank: int, own: BaseException | None) -> BaseException:
    """Returns the exception to raise: an interrupt of any process, else its own error, else that of another."""
    if any(failure.interrupted for failure in failures.values()):
        return own if isinstance(own, KeyboardInterrupt) else KeyboardInterrupt()
    if own is not None and (isinstance(own, TdkitError) or not isinstance(own, Exception)):
        return own
    place = rank if own is not None else min(failures)
    failure = failures[place]
    if failure.error is not None:
        error = pickle.loads(failure.error)
        assert isinstance(error, TdkitError)
        return error
    error = TdkitError(f"process {place} failed: {failure.text}")
    error.__cause__ = own
    return error


def _failure_of(error: BaseException) -> _Failure:
    data = None
    if isinstance(error, TdkitError):
        try:
            data = pickle.dumps(error)
            pickle.loads(data)
        except Exception:  # an __init__ of its own, or an unpicklable value: only the text is sent
            data = None
    return _Failure(repr(error), isinstance(error, KeyboardInterrupt), data)


def _tell(error: BaseException) -> None:
    """Send `error` to the other processes.

    Raises:
        KeyboardInterrupt: when one of them was interrupted, which takes precedence over `error`.
    """

    def fail() -> None:
        raise error

    try:
        _exchange(fail)
    except KeyboardInterrupt:
        raise
    except BaseException:
        _marked(error)


def _marked(error: BaseException) -> BaseException:
    """Mark `error` as already known to all processes; returns it."""
    error._tdkit_known_to_all = True  # type: ignore[attr-defined]
    return error


def _known_to_all(error: BaseException) -> bool:
    return getattr(error, "_tdkit_known_to_all", False)


def _by_itself(work: Callable[[], R]) -> R:
    token = _alone.set(True)
    try:
        return work()
    finally:
        _alone.reset(token)


@contextmanager
def _interrupts_delayed() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block; an exception of the block, known to all processes, takes precedence."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    came: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        came.append(number)

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if came:
        signal.raise_signal(signal.SIGINT)
