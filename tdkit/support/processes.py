"""Processes that ``torch.distributed`` started together: they share work, and what stops one stops all.

Every message between them goes through `_exchange`, and says either what a process has to give or that it failed.
A process that fails, Ctrl-C included, takes part in one exchange more, with its failure. The others get it in the
exchange that they reach next, whatever that one was to be for, and raise it too: none waits for a process that left.
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

_alone = ContextVar("_alone", default=False)  # within on_main_process: the other processes wait


def processes() -> tuple[int, int]:
    """The rank of this process and how many there are; (0, 1) where none were started together."""
    if _alone.get() or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_main_process() -> bool:
    """Whether this is the process that writes files and tells people things: that of rank 0."""
    return processes()[0] == 0


def on_main_process(work: Callable[[], R]) -> R:
    """``work()``, done by the main process alone; the others wait for it and get what it returned.

    Within `work` the main process counts as the only one: what would share work there does all of it, and
    `on_main_process` within `on_main_process` simply does it. What `work` returns must be picklable: it passes between
    the processes of one run, never through a file.

    Raises:
        TdkitError, KeyboardInterrupt: in every process, as `failing_together`, when `work` raises.
    """
    rank, count = processes()
    if count == 1:
        return work()
    return _exchange(lambda: _by_itself(work) if rank == 0 else None)[0]  # type: ignore[return-value]


@contextmanager
def failing_together() -> Iterator[None]:
    """Run a block in every process, to its end in all of them or in none.

    An exception in one process is raised there, and in the others when they next exchange anything or reach the end
    of the block: `KeyboardInterrupt` as itself, an exception of tdkit's own as itself where it can be pickled, any
    other as a `TdkitError` that names the process. Blocks may be nested. A block of a single process is only run.

    The processes must reach the same blocks in the same order, and must not use ``torch.distributed`` in them by any
    other way than this module, or a process can be stopped in that other way while the others wait in this one.
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
    """``work(item)`` for every item in order, each done by one process and sent to the others.

    As many items as there are processes are worked on at once, so no more results than that wait. Results
    must be picklable: they pass between the processes of one run, never through a file.

    Iterate over it within `failing_together`, so that an exception in the loop, between two items, stops the other
    processes too; without, they wait for this process.

    Raises:
        TdkitError, KeyboardInterrupt: in every process, when the work of one of them failed.
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
    """What a process tells of the exception that stopped it: text, since not every exception can be pickled.

    Attributes:
        error: pickled, where it is one of ours and can be.
    """

    text: str
    interrupted: bool
    error: bytes | None


def _exchange(work: Callable[[], R]) -> list[R]:
    """Do some work and give its result to every process: the results of all, in the order of the ranks.

    Raises:
        BaseException: in every process when the work of one raises: here its own, or as `failing_together` says.
    """
    rank, count = processes()
    own: BaseException | None = None
    try:
        message = pickle.dumps((work(), None))
    except BaseException as error:
        own = error
        message = pickle.dumps((None, _failure_of(error)))
    messages: list[Any] = [None] * count
    with _interrupts_delayed():  # one that came between the exchange and the raise would be told in another exchange
        try:
            distributed.all_gather_object(messages, message)
        except BaseException as lost:  # a process was killed, say: there is nobody to tell
            raise _marked(lost) from own
        outcomes = [pickle.loads(each) for each in messages]
        failures = {place: failure for place, (_, failure) in enumerate(outcomes) if failure is not None}
        if failures:
            raise _marked(_to_raise(failures, rank, own))
    return [result for result, _ in outcomes]


def _to_raise(failures: dict[int, _Failure], rank: int, own: BaseException | None) -> BaseException:
    """What this process raises: an interrupt of any process before its own error before that of another."""
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
        except Exception:  # an __init__ of its own, or a value that cannot be pickled: the text is told instead
            data = None
    return _Failure(repr(error), isinstance(error, KeyboardInterrupt), data)


def _tell(error: BaseException) -> None:
    """Tell the other processes that this one stops.

    Raises:
        KeyboardInterrupt: when one of them is interrupted, which comes before `error`.
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
    """`error`, noted as one that needs not be told."""
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
    """Let Ctrl-C wait for the end of the block; the exception of the block, which all processes know, comes first."""
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
