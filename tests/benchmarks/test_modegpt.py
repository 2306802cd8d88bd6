"""MoDeGPT as published: nothing lost changes nothing, the count is that of the smaller weights, shares average out."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.benchmarks import modegpt
from tests.conftest import make_llama


def test_it_is_exact_where_nothing_is_lost_and_less_so_with_each_part() -> None:
    model = make_llama()
    batches = [torch.randint(60, (4, 16)) for _ in range(8)]
    moments = modegpt.measure(model, batches)
    blocks = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    gaps = []
    for lost in (0.0, 0.25, 0.5):
        small = copy.deepcopy(model)
        left = modegpt.compress(small, moments, modegpt.shares_lost(moments, lost, None))
        assert left == pytest.approx((1 - lost) * blocks, rel=0.1)
        with torch.no_grad():
            gaps.append(float((small(batches[0]).logits - model(batches[0]).logits).norm()))
    assert gaps[0] < 1e-3 * gaps[1] < 1e-3 * gaps[2]


def test_blocks_that_change_their_input_less_lose_more() -> None:
    moments = [modegpt.Moments(torch.eye(1), torch.eye(1), influence) for influence in (0.9, 0.1, 0.2)]
    shares = modegpt.shares_lost(moments, 0.3, 0.5)
    assert sum(shares) / 3 == pytest.approx(0.3)
    assert shares[1] > shares[2] > shares[0]
    assert max(modegpt.shares_lost(moments, 0.6, 0.05)) <= 0.95
