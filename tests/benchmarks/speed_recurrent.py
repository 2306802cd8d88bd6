"""Recurrent layers whose weights are held as factors and built in each call: the part of speed.py about them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.evaluation.timing import peak_bytes, side_by_side
from tdkit.models.preparation import cached_bytes, prepare

LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "LSTM 256, 3 layers": lambda: nn.LSTM(256, 256, 3, batch_first=True),
    "LSTM 512, bidirectional": lambda: nn.LSTM(512, 512, bidirectional=True, batch_first=True),
    "GRU 512": lambda: nn.GRU(512, 512, batch_first=True),
}
STEPS = (1, 16, 160)
SHARE = 0.5  # of the parameters
COLUMNS = ["layer", "steps", "dense_ms", "memory", "speed", "peak"]
Row = dict[str, Any]


def measure(seconds: float) -> list[Row]:
    """The time of each layer, preferring memory and preferring speed, as ratios to the dense layer's."""
    rows = []
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        dense = make().requires_grad_(False).eval()
        small = copy.deepcopy(dense)
        tdkit.compress(small, Policy([Rule("*", LowRank())], budget=SHARE), progress=False)
        fast = prepare(copy.deepcopy(small), prefer="speed")
        for steps in STEPS:
            x = torch.randn(1, steps, dense.input_size)
            calls = {
                key: inferring(layer, x) for key, layer in {"dense": dense, "memory": small, "speed": fast}.items()
            }
            timings = side_by_side(calls, seconds=seconds)
            peaks = {key: peak_bytes(calls[key]) for key in ("dense", "speed")}
            rows.append(
                {
                    "layer": name,
                    "steps": steps,
                    "dense_ms": timings["dense"].seconds * 1e3,
                    **{key: timings[key].ratio for key in ("memory", "speed")},
                    "peak": peaks["speed"] / max(peaks["dense"], 1),
                    "cached_mib": cached_bytes(fast) / 2**20,
                }
            )
            print(rows[-1], flush=True)
    return rows


def inferring(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run
