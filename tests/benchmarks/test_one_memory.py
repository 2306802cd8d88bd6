"""Models that are timed in the same memory compute what they did, and their weights do not overlap."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from tests.benchmarks.one_memory import ALIGNMENT, OneMemory


def test_models_take_turns_in_one_memory() -> None:
    torch.manual_seed(0)
    large = nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 5))
    small = nn.Sequential(nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 5), nn.Linear(5, 5, bias=False))
    x = torch.randn(4, 7)
    expected = {model: model(x) for model in (large, small)}
    memory = OneMemory([large, small])
    hold = {model: memory.holder(model) for model in (large, small)}
    for model in (large, small, small, large):
        hold[model]()
        assert torch.equal(model(x), expected[model])
    for model in (large, small):
        hold[model]()
        places = sorted((weight.data_ptr(), weight.nbytes) for weight in model.parameters())
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(places))
        begin, end = memory.memory.data_ptr(), memory.memory.data_ptr() + memory.memory.nbytes
        assert places[0][0] == begin
        assert sum(places[-1]) <= end
        assert end - sum(places[-1]) <= memory.memory.nbytes // 3 + 4 * ALIGNMENT * 4
