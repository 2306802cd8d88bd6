"""`Auto` says what it stands for; every other decomposition stands for itself."""

from __future__ import annotations

import pytest
import torch

from tdkit import Auto, CanonicalPolyadic, Kronecker, LowRank, Metric, SpatialLowRank, TTMatrix, Tucker
from tdkit.errors import OptionError


def test_a_plain_decomposition_is_its_own_alternative() -> None:
    for kind in (LowRank(), Kronecker(terms=2), TTMatrix(ranks=3)):
        assert list(kind.alternatives((12, 18))) == [kind]


def test_auto_stands_for_the_members_that_have_a_choice() -> None:
    kind = Auto(among=(LowRank(rank=10), Kronecker(), TTMatrix()))
    assert list(kind.alternatives((12, 18))) == [LowRank(rank=10), Kronecker(), TTMatrix()]
    assert list(kind.alternatives((12, 8))) == [Kronecker(), TTMatrix()]
    with pytest.raises(OptionError, match=r"low_rank: rank=10 is above the full rank 8 of a 12x8 matrix"):
        Auto(among=(LowRank(rank=10), LowRank(rank=11))).alternatives((12, 8))


def test_within_a_size_a_plain_decomposition_takes_its_richest_choice() -> None:
    weight = torch.randn(12, 18)
    assert LowRank().best_within(weight, None, 95) == LowRank(rank=3)
    assert LowRank().best_within(weight, None, 29) is None


def test_within_a_size_auto_takes_what_has_the_least_error_on_the_weight() -> None:
    torch.manual_seed(0)
    low = torch.randn(16, 2) @ torch.randn(2, 16)
    product = torch.kron(torch.randn(4, 4), torch.randn(4, 4))
    kind = Auto(among=(LowRank(), Kronecker(a=(4, 4))))
    assert kind.best_within(low, None, 64) == LowRank(rank=2)
    assert kind.best_within(product, None, 64) == Kronecker(terms=2, a=(4, 4), b=(4, 4))
    assert kind.best_within(low, None, 31) is None


def test_within_a_size_auto_measures_in_the_metric() -> None:
    """The metric sees the first eight columns only, where the matrix is of rank one."""
    torch.manual_seed(0)
    weight = torch.kron(torch.randn(4, 4), torch.randn(4, 4)) * 100
    weight[:, :8] = torch.randn(16, 1) @ torch.randn(1, 8)
    seen = torch.zeros(16, dtype=torch.float64)
    seen[:8] = 1
    kind = Auto(among=(LowRank(rank=1), Kronecker(terms=1, a=(4, 4))))
    assert kind.best_within(weight, None, 32) == Kronecker(terms=1, a=(4, 4), b=(4, 4))
    assert kind.best_within(weight, Metric(input=seen), 32) == LowRank(rank=1)


def test_by_default_auto_compares_decompositions_of_tensors_where_they_can_gain() -> None:
    names = {shape: [member.name for member in Auto().alternatives(shape)] for shape in ((6, 4), (6, 4, 1, 1))}
    assert set(map(tuple, names.values())) == {("low_rank", "kronecker")}
    assert [member.name for member in Auto().alternatives((6, 4, 3))][2:] == ["tucker", "cp"]
    assert [member.name for member in Auto().alternatives((6, 4, 3, 3))][2:] == ["tucker", "spatial_low_rank", "cp"]
    assert Auto().options() == {}


def test_a_member_that_was_asked_for_must_take_the_order() -> None:
    kind = Auto(among=("low_rank", "tucker"))
    assert [member.name for member in kind.alternatives((6, 4, 3, 3))] == ["low_rank", "tucker"]
    with pytest.raises(OptionError, match=r"tucker takes weights of 3, 4, 5 dimensions, not a 6x4 one"):
        kind.alternatives((6, 4))


def test_auto_finds_the_form_of_a_tensor() -> None:
    torch.manual_seed(0)
    shape = (8, 6, 3, 3)
    for planted in (Tucker(rank_out=2, rank_in=3), SpatialLowRank(rank=2, first=1), CanonicalPolyadic(rank=1)):
        matrix = planted.empty(shape)
        with torch.no_grad():
            for parameter in matrix.parameters():
                parameter.normal_()
            weight = matrix.dense().reshape(shape)
        best = Auto().best_within(weight, None, matrix.params)
        assert best is not None
        assert best.name == planted.name
        points = [point for point in Auto().curve(weight) if point.params <= matrix.params]
        assert points[-1].error <= 0.2 * float(weight.square().sum())
