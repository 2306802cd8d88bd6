"""Signals that ask a run to stop: it finishes its step and saves itself first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether this process was asked to stop.

    Attributes:
        signal: name of the signal that asked; None when there was none.
    """

    def __init__(self) -> None:
        self.signal: str | None = None


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[Stop]:
    """Note SIGTERM and Ctrl-C while the context is open, instead of ending at once; a second Ctrl-C does end at once.

    Only the main thread can receive signals. A program that has a handler of its own for SIGINT keeps it.

    Args:
        say: how to tell a person that the step is finished first.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, _frame: Any) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number).name
        say(f"{stop.signal}: stopping after this step (Ctrl-C to stop at once and lose it)")

    before = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.default_int_handler
    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
