"""Time and memory of calls, measured alternately so that other load on the machine slows all of them alike."""

from __future__ import annotations

import ctypes
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tdkit.support.compatibility import storage_id, tree_leaves

SAMPLE_SECONDS = 5e-3  # shorter calls are repeated within a sample, to hide clock resolution and cold caches
MAX_REPEATS = 200
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT_BELOW = 2**25  # bytes of an allocation that `keep_freed_memory` takes from memory that was freed


@dataclass(frozen=True)
class Timing:
    """The time of one contender.

    Attributes:
        seconds: median time of a call.
        ratio: median over the rounds of its time divided by that of the first contender in the same round.
    """

    seconds: float
    ratio: float


def side_by_side(
    contenders: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.5,
    min_rounds: int = 7,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time calls in turn, round after round, and compare each with the first of the same round.

    Args:
        contenders: the calls by name; the others are compared with the first.
        seconds: how long to time each contender, after a warm-up. Short calls are repeated within a sample, after one
            call that is not timed.
        min_rounds: the minimum number of rounds, however long they take.
        device: synchronized at the end of each sample if it is a CUDA device.
        clock: a function that returns the time in seconds.
        prepare: what to do before each sample, by contender; it and a call after it are not timed.

    Returns:
        The timings by name.
    """
    kind, ready = torch.device(device), prepare or {}
    repeats: dict[str, int] = {}
    for name, call in contenders.items():
        if name in ready:
            ready[name]()
        repeats[name] = _repeats(call, kind, clock)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    started = clock()
    while len(next(iter(samples.values()))) < min_rounds or clock() - started < seconds * len(samples):
        for name, call in contenders.items():
            if name in ready:
                ready[name]()
                call()
            samples[name].append(_sample(call, repeats[name], kind, clock))
    base = next(iter(samples.values()))
    return {
        name: Timing(
            statistics.median(times), statistics.median(own / first for own, first in zip(times, base, strict=True))
        )
        for name, times in samples.items()
    }


def _repeats(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> int:
    if _sample(call, 1, device, clock) > 20 * SAMPLE_SECONDS:  # warm-up: allocations, thread pools, cached weights
        return 1
    _sample(call, 2, device, clock)
    shortest = min(_sample(call, 1, device, clock) for _ in range(3))
    return max(1, min(MAX_REPEATS, round(SAMPLE_SECONDS / shortest)))


def _sample(call: Callable[[], object], repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    if repeats > 1:
        call()  # the caches hold code and data of the previous contender
    started = clock()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - started) / repeats


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later tensors, for the rest of the process, so that timings are reproducible.

    By default, whether a tensor of some MiB is allocated in new pages, with a page fault for every 4 KiB, depends on
    what was freed before: of two equal calls one can take twice as long as the other.

    Returns:
        Whether it succeeded; False when the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, KEPT_BELOW) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


def saved_bytes(forward: Callable[[], object]) -> int:
    """Returns the bytes that a forward pass saves for backward, saved parameters included; storages count once."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # kept alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values())


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Returns the peak number of bytes of tensors that a call allocates, beyond those allocated before it."""
    kind = torch.device(device)
    if kind.type == "cuda":
        torch.cuda.synchronize(kind)
        torch.cuda.reset_peak_memory_stats(kind)
        before = torch.cuda.memory_allocated(kind)
        call()
        torch.cuda.synchronize(kind)
        return int(torch.cuda.max_memory_allocated(kind)) - before
    with _Allocations() as allocations:
        call()
    return int(allocations.peak)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf, given)
        return output

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage_id(tensor), storage.nbytes()
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
