"""The tree of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tdkit.records.tree import render_tree, tree_of


def test_equal_siblings_share_a_branch_and_tied_weights_count_once(gpt2: Any) -> None:
    branches = tree_of(gpt2)
    assert branches[0].params == (sum(p.numel() for p in gpt2.parameters()),) * 2
    blocks = next(branch for branch in branches if branch.kind == "GPT2Block")
    assert (blocks.name, blocks.count) == ("0-3", 4)
    assert blocks.params == (sum(p.numel() for p in gpt2.transformer.h[0].parameters()),) * 2
    attention = next(branch for branch in branches if branch.name == "c_attn")
    assert attention.count == 4
    assert attention.shapes == {"weight": "32x96", "bias": "96"}


def test_siblings_of_different_sizes_have_a_range() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5), nn.ReLU())
    branches = tree_of(model)
    assert [(b.depth, b.name, b.kind, b.count, b.params) for b in branches] == [
        (0, "", "Sequential", 1, (50, 50)),
        (1, "0-2", "Linear", 3, (9, 25)),
        (1, "3", "ReLU", 1, (0, 0)),
    ]
    assert branches[1].shapes == {"weight": "...", "bias": "..."}
    lines = render_tree(branches).splitlines()
    assert lines[1].split() == ["0-2:", "Linear", "3", "x", "9..25", "weight", "...,", "bias", "..."]


def test_models_on_the_meta_device_have_a_tree() -> None:
    with torch.device("meta"):
        assert tree_of(nn.Linear(2, 3))[0].params == (9, 9)
