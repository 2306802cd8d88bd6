"""The number of threads that computations on small matrices use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 1 << 17  # entries of a weight below which its fits use one thread


@contextmanager
def threads_for(entries: int) -> Iterator[None]:
    """A context in which torch uses one thread if a weight has fewer than `SMALL` entries.

    The fits of such a weight are many short operations. Starting a second thread for each takes about as long as the
    operation, and far longer if the processor is busy: a thread that has no core keeps the other one waiting.
    """
    before = torch.get_num_threads()
    if entries >= SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
