"""The permutation search recovers planted orders, is never worse than the given order and is deterministic."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdkit.fitting.linalg import nearest_kronecker, rearrange, relative_error, restore
from tdkit.fitting.permutations.assignment import best_assignment
from tdkit.fitting.permutations.search import Climb, Ordering, _refit_gain, search
from tdkit.shapes import Shape
from tests.planted import Factors, gaussian, non_negative, orthogonal, plant, rank_two, repeated, signs


def error(matrix: Tensor, found: Ordering, a: Shape, b: Shape) -> float:
    approximation = restore(found.a.flatten(1).T @ found.b.flatten(1), a, b)
    return relative_error(matrix[found.rows][:, found.columns], approximation)


@pytest.mark.parametrize(
    ("a", "b", "terms"),
    [
        ((16, 16), (12, 12), 1),  # 192 x 192
        ((8, 24), (24, 8), 1),
        ((8, 24), (24, 8), 2),
        ((4, 4), (48, 48), 1),
        ((16, 16), (16, 36), 1),  # 256 x 576
        ((16, 24), (16, 24), 4),
        ((24, 24), (24, 24), 3),  # 576 x 576
    ],
    ids=str,
)
def test_planted_orders_are_found_under_noise(a: Shape, b: Shape, terms: int) -> None:
    planted = plant(a, b, terms=terms, noise=0.3)
    found = search(planted.matrix, a, b, terms)
    assert error(planted.matrix, found, a, b) < planted.error + 0.01


@pytest.mark.parametrize("factors", [gaussian, orthogonal, non_negative, rank_two, repeated])
@pytest.mark.parametrize("shuffled", ["rows", "columns", "both"])
def test_planted_orders_are_found_exactly(factors: Factors, shuffled: str) -> None:
    a, b = (16, 16), (16, 16)
    matrix = plant(a, b, factors=factors).matrix
    found = search(matrix, a, b, 1)
    if shuffled != "both":  # undo the order of the other side, and let the search move one side only
        matrix = matrix[:, found.columns] if shuffled == "rows" else matrix[found.rows]
        found = search(matrix, a, b, 1, rows=shuffled == "rows", columns=shuffled == "columns")
    assert error(matrix, found, a, b) < 1e-6
    assert sorted(found.rows.tolist()) == list(range(256)) == sorted(found.columns.tolist())


def test_counting_the_refit_finds_what_assignments_for_fixed_factors_miss() -> None:
    a, b = (16, 16), (12, 12)
    planted = plant(a, b, noise=0.5, seed=3)
    found = search(planted.matrix, a, b, 1)
    assert error(planted.matrix, found, a, b) < planted.error + 1e-4


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_factors_of_one_magnitude_that_no_spectral_start_sees(noise: float) -> None:
    planted = plant((16, 16), (16, 16), noise=noise, factors=signs)
    found = search(planted.matrix, (16, 16), (16, 16), 1)
    assert error(planted.matrix, found, (16, 16), (16, 16)) < planted.error + 1e-4


def test_groups_that_fit_nearly_as_well_turned_over() -> None:
    a, b = (48, 36), (2, 4)  # two columns of B are nearly the negatives of the other two
    planted = plant(a, b, noise=0.3, seed=1)
    found = search(planted.matrix, a, b, 1)
    assert error(planted.matrix, found, a, b) < planted.error + 1e-4


def test_turning_groups_over_goes_on_where_single_rows_do_not_move() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 20, 15, generator=generator, dtype=torch.float64)
    b = torch.tensor([[[1.0, 0.5, -1.1, -0.4], [0.3, 1.2, -0.2, -1.3]]], dtype=torch.float64)
    matrix = torch.kron(a[0], b[0])
    climb = Climb(matrix, (20, 15), (2, 4), 1, rows=True, columns=True, effort=1)
    columns = torch.arange(60).reshape(15, 4)
    columns[::2] = columns[::2][:, [2, 3, 0, 1]]  # every other group, as if its column of A were negated
    stuck = climb.fit(torch.arange(40), columns.flatten())
    assert climb.improved(stuck).energy == pytest.approx(stuck.energy)
    assert climb.turned(stuck).energy == pytest.approx(climb.total)


def test_counting_the_refit_goes_on_where_nothing_moves_for_fixed_factors() -> None:
    matrix = torch.randn(96, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    climb = Climb(matrix, (8, 10), (12, 8), 2, rows=True, columns=True, effort=20)
    fixed = climb.by_norm()
    while (now := climb.improved(fixed)).energy > fixed.energy:
        fixed = now
    refined = climb.refined(fixed)
    assert refined.energy > 1.2 * fixed.energy
    assert climb.fit(refined.rows, refined.columns).energy == pytest.approx(refined.energy)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_the_gain_of_one_row_is_that_of_refitting_either_factor(terms: int) -> None:
    a, b = (3, 4), (2, 5)
    generator = torch.Generator().manual_seed(terms)
    matrix = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)
    left, right = nearest_kronecker(matrix[order], a, b, terms)
    gain = _refit_gain(matrix, left, right, order)

    bases = [torch.linalg.qr(factors.flatten(1).T)[0] for factors in (left, right)]
    approximation = restore(left.flatten(1).T @ right.flatten(1), a, b)

    def energy(rows: Tensor) -> float:
        """The energy with either basis kept, less the inner product that both count."""
        flat = rearrange(matrix[rows], a, b)
        kept = (bases[0].T @ flat).square().sum() + (flat @ bases[1]).square().sum()
        return float(kept - 2 * (matrix[rows] * approximation).sum())

    for place in range(6):
        for row in range(6):
            replaced = order.clone()
            replaced[place] = row
            assert float(gain[place, row] - gain[place, order[place]]) == pytest.approx(
                energy(replaced) - energy(order)
            )


sizes = st.integers(1, 6)


@settings(max_examples=40, deadline=None)
@given(a=st.tuples(sizes, sizes), b=st.tuples(sizes, sizes), terms=st.integers(1, 3), rows=st.booleans(), seed=sizes)
def test_never_worse_than_the_given_order(a: Shape, b: Shape, terms: int, rows: bool, seed: int) -> None:
    terms = min(terms, a[0] * a[1], b[0] * b[1])
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(a[0] * b[0], a[1] * b[1], generator=generator, dtype=torch.float64)
    left, right = nearest_kronecker(matrix, a, b, terms)
    plain = relative_error(matrix, restore(left.flatten(1).T @ right.flatten(1), a, b))
    found = search(matrix, a, b, terms, rows=rows)
    assert error(matrix, found, a, b) <= plain + 1e-12
    assert found.energy == pytest.approx((1 - error(matrix, found, a, b) ** 2) * float(matrix.square().sum()))
    if not rows:
        assert torch.equal(found.rows, torch.arange(len(matrix)))


@settings(max_examples=25, deadline=None)
@given(a=st.tuples(sizes, sizes), b=st.tuples(sizes, sizes), terms=st.integers(1, 3), rows=st.booleans(), seed=sizes)
def test_no_step_of_the_search_loses_energy(a: Shape, b: Shape, terms: int, rows: bool, seed: int) -> None:
    terms = min(terms, a[0] * a[1], b[0] * b[1])
    matrix = torch.randn(a[0] * b[0], a[1] * b[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    climb = Climb(matrix, a, b, terms, rows=rows, columns=True, effort=1)
    ordering = climb.by_norm()
    for step in (climb.refined, climb.improved, climb.refined, climb.finished, climb.refined):
        now = step(ordering)
        assert now.energy >= ordering.energy
        assert sorted(now.rows.tolist()) == list(range(len(matrix)))
        assert sorted(now.columns.tolist()) == list(range(matrix.shape[1]))
        ordering = now


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_tiny_and_huge_matrices(size: float) -> None:
    matrix = plant((8, 8), (8, 9)).matrix * size
    found = search(matrix, (8, 8), (8, 9), 1)
    assert error(matrix / size, Ordering(found.rows, found.columns, found.a, found.b / size, 0), (8, 8), (8, 9)) < 1e-6


@pytest.mark.parametrize(
    ("matrix", "least"),
    [(torch.zeros(6, 6), 0.0), (torch.ones(6, 6), 0.0), (torch.eye(6), 0.7)],
    ids=["zeros", "ones", "eye"],
)
def test_degenerate_matrices(matrix: Tensor, least: float) -> None:
    """`least` is an error that some order reaches; for the identity the given order has 0.82."""
    found = search(matrix.double(), (2, 3), (3, 2), 1)
    assert error(matrix.double(), found, (2, 3), (3, 2)) <= least + 1e-12


def test_deterministic() -> None:
    matrix = torch.randn(96, 64, dtype=torch.float64)
    first, second = (search(matrix, (8, 8), (12, 8), 2, seed=3) for _ in range(2))
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.columns, second.columns)
    assert torch.equal(first.a, second.a)


def test_without_effort_no_spectral_start_finds_several_terms() -> None:
    a, b = (8, 24), (24, 8)
    planted = plant(a, b, terms=2, noise=0.3)
    assert error(planted.matrix, search(planted.matrix, a, b, 2), a, b) < planted.error + 1e-4
    assert error(planted.matrix, search(planted.matrix, a, b, 2, effort=0), a, b) > 0.8


@pytest.mark.parametrize("exact_size", [1, 7, 64])
def test_an_assignment_is_a_permutation_near_the_best_one(exact_size: int) -> None:
    gain = torch.randn(40, 40)
    order = best_assignment(gain, exact_size=exact_size)
    assert sorted(order.tolist()) == list(range(40))
    best = gain[torch.arange(40), best_assignment(gain)].sum()
    assert gain[torch.arange(40), order].sum() >= (1 - 1e-6 if exact_size >= 40 else 0.85) * best  # any other: about 0


def test_an_assignment_is_the_best_of_all_permutations() -> None:
    gain = torch.randn(6, 6)
    best = max(float(gain[torch.arange(6), list(order)].sum()) for order in itertools.permutations(range(6)))
    assert float(gain[torch.arange(6), best_assignment(gain)].sum()) == pytest.approx(best)


def test_an_obvious_assignment_needs_no_exact_one() -> None:
    order = torch.randperm(50)
    gain = torch.rand(50, 50)
    gain[torch.arange(50), order] += 1
    assert torch.equal(best_assignment(gain, exact_size=1), order)


def test_a_side_that_stays_is_not_searched_and_tall_tables_fit_in_memory() -> None:
    """An embedding: only its columns move; projectors of the rows' space would hold 192 x 4096^2 numbers."""
    table = torch.kron(torch.randn(4096, 48, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64))
    shuffled = table[:, torch.randperm(192)] + 0.1 * torch.randn(4096, 192, dtype=torch.float64)
    found = search(shuffled, (4096, 48), (1, 4), 1, rows=False)
    assert torch.equal(found.rows, torch.arange(4096))
    assert found.energy > 0.97 * float(shuffled.square().sum())
