"""Blocks of rows with factors of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tdkit
from tdkit import Kronecker, LowRank, Policy, Rule
from tdkit.decompositions.blocks import Blocks
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import OptionError
from tdkit.testing import Check, checks

SHAPES = [(12, 7), (6, 5), (30, 12)]
KINDS = [Blocks(), Blocks(each=Kronecker(), parts=2)]


@pytest.mark.parametrize(
    "check",
    [pytest.param(c, id=f"{kind}-{c}") for kind in KINDS for c in checks(kind, shapes=SHAPES, metric="used")],
)
def test_contract(check: Check) -> None:
    check()


def test_blocks_of_low_rank_are_exact_where_the_whole_is_not() -> None:
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(8, 2) @ torch.randn(2, 16) for _ in range(3)])
    matrix = Blocks(each=LowRank(rank=2)).fit(weight)
    torch.testing.assert_close(matrix.dense(), weight, rtol=1e-4, atol=1e-5)
    assert matrix.params == 3 * 2 * (8 + 16)
    assert LowRank(rank=4).error(weight, LowRank(rank=4).fit(weight)) > 0.1


def test_the_packed_projection_of_attention_by_heads() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    model = nn.ModuleDict({"a": attention})
    plan = tdkit.plan(model, Policy([Rule("a.in_proj_weight", Blocks(parts=3)), Rule("*", LowRank())], budget=0.7))
    assert plan["a.in_proj_weight"].decomposition.parts == 3
    tdkit.compress(model, plan)
    x = torch.randn(2, 5, 16)
    assert model["a"](x, x, x)[0].shape == (2, 5, 16)
    assert tdkit.applied_plan(model).params_after == plan.params_after


def test_it_is_read_again_from_its_spec() -> None:
    kind = Blocks(each=Kronecker(terms=2, a=(1, 2)), parts=4)
    assert decomposition(spec_of(kind)) == kind


def test_rows_that_cannot_be_cut_are_an_error() -> None:
    with pytest.raises(OptionError, match=r"parts=3 does not divide the 8 rows of a 8x4 matrix"):
        Blocks().check((8, 4))
    with pytest.raises(OptionError, match="must be a decomposition of matrices"):
        Blocks(each="tucker")
