"""Work of which all processes of a run must know whether it failed, so that none waits for another one for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tdkit.support.processes import shared

R = TypeVar("R")


def from_all(engine: Any, value: R) -> list[R]:
    """Every process's value, by rank; all of them must call this."""
    return list(shared(range(engine.num_processes), lambda _: value))


def in_all(engine: Any, work: Callable[[], R]) -> R:
    """Do `work` in every process, and return this one's result once all are done; all of them must call this.

    Args:
        engine: the ``accelerate.Accelerator``, which knows how many processes there are.

    Raises:
        Exception: what the work of any process raised, in every process.
    """
    results: list[R] = []
    list(shared(range(engine.num_processes), lambda _: results.append(work())))
    return results[0]
