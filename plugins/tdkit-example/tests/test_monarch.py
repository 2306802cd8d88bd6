"""Monarch passes the contract, finds a planted Monarch matrix, and goes through compress, save and load by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import tdkit
import torch
from tdkit import LowRank, Policy
from tdkit.decompositions.registered import decompositions
from tdkit.errors import OptionError
from tdkit.fitting.linalg import relative_error
from tdkit.testing import Check, checks
from torch import nn

from tdkit_example.monarch import Monarch


@pytest.mark.parametrize("check", checks(Monarch), ids=str)
def test_contract(check: Check) -> None:
    check()


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_contract_holds_for_any_number_of_blocks(blocks: int) -> None:
    for check in checks(Monarch(blocks=blocks), shapes=[(12, 18), (7, 11)]):
        check()


def test_it_is_found_by_its_entry_point() -> None:
    assert decompositions.origins()["monarch"] == ["tdkit-example"]
    assert decompositions.get("monarch") is Monarch


def test_a_planted_monarch_matrix_is_found_where_low_rank_finds_nothing() -> None:
    planted = Monarch(rank=1, blocks=8).empty((64, 64), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in planted.parameters():
            factor.copy_(torch.randn(factor.shape, dtype=torch.float64, generator=generator))
    weight = planted.dense().detach()
    found = Monarch(rank=1, blocks=8).fit(weight)
    assert relative_error(weight, found.dense()) < 1e-12
    same_size = LowRank(rank=found.params // 128)
    assert relative_error(weight, same_size.fit(weight).dense()) > 0.5


def test_one_block_is_low_rank() -> None:
    weight = torch.randn(12, 18, dtype=torch.float64)
    torch.testing.assert_close(Monarch(rank=3, blocks=1).fit(weight).dense(), LowRank(rank=3).fit(weight).dense())


def test_impossible_options_are_told() -> None:
    with pytest.raises(
        OptionError, match=r"monarch: rank=4 is above the full rank 3 of the 4x2 blocks of a 12x18 matrix"
    ):
        Monarch(rank=4).check((12, 18))
    with pytest.raises(OptionError, match=r"monarch: blocks=0 must be an integer of at least 1"):
        Monarch(blocks=0)


def test_a_model_goes_through_compress_save_and_load(tmp_path: Path) -> None:
    def dense() -> nn.Sequential:
        return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))

    policy = Policy.from_yaml("rules: [{match: '*', with: {monarch: {blocks: 2}}}]\nbudget: 0.5")
    model, x = tdkit.compress(dense(), policy), torch.randn(5, 24)
    assert tdkit.applied_plan(model).ratio <= 0.5
    loaded = tdkit.load(tdkit.save(model, tmp_path / "saved"), model=dense())
    assert torch.equal(loaded(x), model(x))
