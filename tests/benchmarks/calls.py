"""What the parts of the speed benchmark share: random factors, calls without gradients, and one comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tdkit import Decomposition, FactorizedMatrix
from tdkit.evaluation.timing import peak_bytes, side_by_side
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


def compared(calls: Mapping[str, Callable[[], object]], fast: nn.Module, **timing: Any) -> Row:
    """The times of calls without gradients as ratios to ``dense``, and the peak memory of ``speed`` by that of it.

    Args:
        calls: by name.
        fast: the layer of ``speed``.
        timing: as of `side_by_side`.
    """
    inferences = {name: inferring(call) for name, call in calls.items()}
    timings = side_by_side(inferences, **timing)
    peaks = {name: peak_bytes(inferences[name]) for name in ("dense", "speed")}
    return {
        "dense_ms": timings["dense"].seconds * 1e3,
        **{name: timings[name].ratio for name in calls if name != "dense"},
        "peak": peaks["speed"] / max(peaks["dense"], 1),
        "cached_mib": cached_bytes(fast) / 2**20,
    }
