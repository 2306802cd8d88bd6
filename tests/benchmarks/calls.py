"""What the parts of the speed benchmark share: random factors, calls without gradients, and one comparison."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdkit import Decomposition, FactorizedMatrix
from tdkit.evaluation.timing import KEPT_BELOW, MMAP_THRESHOLD, peak_bytes, side_by_side
from tdkit.models.preparation import cached_bytes

Row = dict[str, Any]


def filled(kind: Decomposition, shape: tuple[int, ...]) -> FactorizedMatrix:
    """Random factors: the time does not depend on their values."""
    matrix = kind.empty(shape).eval()
    with torch.no_grad():
        for factor in matrix.parameters():
            factor.normal_(std=0.05)
    return matrix


def inferring(call: Callable[[], object]) -> Callable[[], object]:
    """The call under `torch.inference_mode()`."""

    def run() -> object:
        with torch.inference_mode():
            return call()

    return run


def resident_bytes(call: Callable[[], object]) -> int:
    """The peak of the process's resident memory in a call, beyond that before it; 0 where Linux does not tell.

    Unlike the tensors that torch allocates, it has the copies that oneDNN makes inside a convolution.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0

    def line(name: str) -> int:
        return 1024 * int(status.read_text().split(f"{name}:")[1].split()[0])

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return 0
    libc.mallopt(MMAP_THRESHOLD, 2**16)  # each larger tensor in pages of its own, which are returned at once
    try:
        call()
        libc.malloc_trim(0)  # keep_freed_memory() holds pages that are free
        reset.write_text("5")  # resets the peak
        before = line("VmRSS")
        call()
        return max(line("VmHWM") - before, 0)
    finally:
        libc.mallopt(MMAP_THRESHOLD, KEPT_BELOW)


def compared(calls: Mapping[str, Callable[[], object]], fast: nn.Module, **timing: Any) -> Row:
    """The times of calls without gradients as ratios to ``dense``, and the peak memory of ``speed`` by that of it.

    Memory is counted as tensors (``peak``) and as pages of the process (``resident``), the median of three calls each.

    Args:
        calls: by name.
        fast: the layer of ``speed``.
        timing: as of `side_by_side`.
    """
    inferences = {name: inferring(call) for name, call in calls.items()}
    timings = side_by_side(inferences, **timing)
    sides = ("dense", "speed")
    peaks = {name: peak_bytes(inferences[name]) for name in sides}
    pages = {name: statistics.median(resident_bytes(inferences[name]) for _ in range(3)) for name in sides}
    return {
        "dense_ms": timings["dense"].seconds * 1e3,
        **{name: timings[name].ratio for name in calls if name != "dense"},
        "peak": peaks["speed"] / max(peaks["dense"], 1),
        "resident": pages["speed"] / pages["dense"] if pages["dense"] else None,
        "cached_mib": cached_bytes(fast) / 2**20,
    }
