"""Recurrent layers whose weights are held as factors, built in each call or cached: the part of speed.py about them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.decompositions.base import Preference
from tdkit.models.preparation import prepare
from tests.benchmarks.calls import Row, compared

LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "LSTM 256, 3 layers": lambda: nn.LSTM(256, 256, 3, batch_first=True),
    "LSTM 512, bidirectional": lambda: nn.LSTM(512, 512, bidirectional=True, batch_first=True),
    "GRU 512": lambda: nn.GRU(512, 512, batch_first=True),
}
STEPS = (1, 16, 160)
PREFERENCES: tuple[Preference, ...] = ("memory", "auto", "speed")
SHARE = 0.5  # of the parameters
COLUMNS = ["layer", "steps", "dense_ms", "memory", "auto", "speed", "peak"]


def measure(seconds: float) -> list[Row]:
    """The time of each layer, preferring memory, neither and speed, as ratios to the dense layer's."""
    rows = []
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        dense = make().requires_grad_(False).eval()
        small = copy.deepcopy(dense)
        tdkit.compress(small, Policy([Rule("*", LowRank())], budget=SHARE), progress=False)
        layers = {"dense": dense, **{each: prepare(copy.deepcopy(small), prefer=each) for each in PREFERENCES}}
        for steps in STEPS:
            x = torch.randn(1, steps, dense.input_size)
            calls = {each: partial(layer, x) for each, layer in layers.items()}
            times = compared(calls, layers["speed"], seconds=seconds)
            rows.append({"layer": name, "steps": steps, **times})
            print(rows[-1], flush=True)
    return rows
