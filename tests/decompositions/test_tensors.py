"""Tucker, CP and spatial low rank: their choices for a shape, their sizes, and what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch

from tdkit import (
    CanonicalPolyadic,
    Decomposition,
    Kronecker,
    LowRank,
    PermutedKronecker,
    SpatialLowRank,
    TTMatrix,
    Tucker,
)
from tdkit.errors import OptionError

SHAPE = (16, 8, 3, 3)


def test_tucker_ranks_grow_in_proportion_to_the_channels() -> None:
    pairs = [(c.rank_out, c.rank_in) for c in Tucker().candidates(SHAPE)]
    assert pairs[0] == (1, 1)
    assert pairs[-1] == (16, 8)
    assert all(a[0] <= b[0] and a[1] <= b[1] and a != b for a, b in itertools.pairwise(pairs))
    assert all(c.num_params(SHAPE) < 16 * 8 * 9 for c in Tucker().candidates(SHAPE)[:-1])
    assert [c.rank_in for c in Tucker(rank_out=4).candidates(SHAPE)] == list(range(1, 9))
    assert {c.rank_out for c in Tucker(rank_in=1).candidates(SHAPE)} <= set(range(1, 10))


def test_a_kernel_of_one_position_bounds_each_tucker_rank_by_the_other() -> None:
    assert all(c.rank_out == c.rank_in for c in Tucker().candidates((6, 9, 1, 1)))


def test_tucker_chooses_the_pair_of_ranks_on_the_weight() -> None:
    torch.manual_seed(0)
    narrow_in = torch.einsum("oit,ij->ojt", torch.randn(16, 2, 9), torch.randn(2, 8)).reshape(SHAPE)
    narrow_out = torch.einsum("ap,abt->pbt", torch.randn(2, 16), torch.randn(2, 8, 9)).reshape(SHAPE)
    for weight, pair in ((narrow_in, (16, 2)), (narrow_out, (2, 8))):
        needed = Tucker(rank_out=pair[0], rank_in=pair[1]).num_params(SHAPE)
        kind = Tucker().best_within(weight, None, needed)
        assert isinstance(kind, Tucker)
        assert kind.error(weight, kind.fit(weight)) < 1e-3
        assert Tucker().complete(SHAPE, needed) != kind


def test_the_axis_that_comes_first_is_chosen_on_the_weight() -> None:
    torch.manual_seed(0)
    for first in (0, 1):
        planted = SpatialLowRank(rank=3, first=first).empty(SHAPE)
        with torch.no_grad():
            for parameter in planted.parameters():
                parameter.normal_()
            weight = planted.dense().reshape(SHAPE)
        kind = SpatialLowRank().best_within(weight, None, planted.params)
        assert isinstance(kind, SpatialLowRank)
        assert kind.first == first
        assert kind.error(weight, kind.fit(weight)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (Tucker(rank_out=17), SHAPE, r"tucker: rank_out=17 is above the full rank 16 of a 16x8x3x3 weight"),
        (Tucker(rank_in=9), SHAPE, r"tucker: rank_in=9 is above the full rank 8 of a 16x8x3x3 weight"),
        (Tucker(rank_out=10, rank_in=1), SHAPE, r"tucker: rank_out=10 is above the full rank 9 of a core"),
        (Tucker(), (16, 8), r"tucker takes weights of 3, 4, 5 dimensions, not a 16x8 one"),
        (CanonicalPolyadic(rank=73), SHAPE, r"cp: rank=73 is above 72, at which a 16x8x3x3 weight is exact"),
        (CanonicalPolyadic(), (16, 8), r"cp takes weights of 3, 4, 5 dimensions"),
        (SpatialLowRank(rank=25), SHAPE, r"spatial_low_rank: rank=25 is above the full rank 24 of a 16x8x3x3 weight"),
        (SpatialLowRank(), (16, 8, 3), r"spatial_low_rank takes weights of 4 dimensions, not a 16x8x3 one"),
    ],
)
def test_what_a_shape_cannot_meet_is_told(kind: Decomposition, shape: tuple[int, ...], message: str) -> None:
    for act in (kind.candidates, lambda s: kind.empty(s, device="meta"), lambda s: kind.fit(torch.zeros(s))):
        with pytest.raises(OptionError, match=message):
            act(shape)


def test_impossible_options_are_told() -> None:
    with pytest.raises(OptionError, match=r"first=2 must be 0 or 1, one of the two spatial axes"):
        SpatialLowRank(first=2)
    with pytest.raises(OptionError, match=r"tucker: rank_in=0 must be an integer of at least 1"):
        Tucker(rank_in=0)


def test_chains_have_the_expected_stages() -> None:
    weight = torch.randn(SHAPE)
    tucker = Tucker(rank_out=5, rank_in=4).fit(weight).convolutions((3, 3), 1)
    assert tucker is not None
    assert [tuple(stage.weight.shape) for stage in tucker] == [(4, 8, 1, 1), (5, 4, 3, 3), (16, 5, 1, 1)]
    cp = CanonicalPolyadic(rank=7).fit(weight).convolutions((3, 3), 1)
    assert cp is not None
    assert [(tuple(s.weight.shape), s.axes, s.groups) for s in cp] == [
        ((7, 8, 1, 1), (), 1),
        ((7, 1, 3, 1), (0,), 7),
        ((7, 1, 1, 3), (1,), 7),
        ((16, 7, 1, 1), (), 1),
    ]
    spatial = SpatialLowRank(rank=6, first=1).fit(weight).convolutions((3, 3), 1)
    assert spatial is not None
    assert [(tuple(s.weight.shape), s.axes) for s in spatial] == [((6, 8, 1, 3), (1,)), ((16, 6, 3, 1), (0,))]
    low_rank = LowRank(rank=6).fit(weight.flatten(1)).convolutions((3, 3), 1)
    assert low_rank is not None
    assert [tuple(s.weight.shape) for s in low_rank] == [(6, 8, 3, 3), (16, 6, 1, 1)]
    kronecker = Kronecker(terms=2, a=(4, 2)).fit(weight.flatten(1)).convolutions((3, 3), 2)
    assert kronecker is not None
    assert [(tuple(s.weight.shape), s.groups, s.leading, s.trailing) for s in kronecker] == [
        ((8, 4, 3, 3), 1, 4, 1),
        ((4, 4, 1, 1), 2, 1, 4),
    ]


def test_factors_that_do_not_align_with_the_kernel_make_no_chain() -> None:
    weight = torch.randn(16, 72)
    assert Kronecker(terms=2, b=(4, 3)).fit(weight).convolutions((3, 3), 1) is None
    assert Kronecker(terms=2, a=(2, 2)).fit(weight).convolutions((3, 3), 4) is None  # groups share rows of A
    assert LowRank(rank=2).fit(weight).convolutions((5, 5), 1) is None
    assert TTMatrix(ranks=3).fit(weight).convolutions((3, 3), 1) is None
    permuted = PermutedKronecker(terms=2, a=(4, 2), b=(4, 36)).fit(weight)
    assert permuted.convolutions((3, 3), 1) is None
    plain = PermutedKronecker(terms=2, a=(4, 2), b=(4, 36), rows=False, cols=False).fit(weight)
    assert plain.convolutions((3, 3), 1) is not None
    assert Tucker(rank_out=2, rank_in=2).fit(weight.reshape(SHAPE)).convolutions((9,), 1) is None
