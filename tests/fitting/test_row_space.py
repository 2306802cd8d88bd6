"""The structured factor Z: products and gradients against dense ones, and the objective against a brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdkit import Metric
from tdkit.fitting.row_space import row_space_problem
from tdkit.fitting.spans import KhatriRaoSpan, RepeatedSpan, Span
from tests.fitting import moments
from tests.fitting.moments import random

CASES: dict[str, tuple[Span, list[tuple[int, int]], tuple[int, ...]]] = {
    "repeated": (RepeatedSpan(3), [(4, 2)], (4, 3)),
    "repeated once": (RepeatedSpan(1), [(5, 2)], (5, 1)),
    "khatri-rao of 2": (KhatriRaoSpan(), [(4, 5), (3, 5)], (4, 3)),
    "khatri-rao of 3": (KhatriRaoSpan(), [(2, 5), (3, 5), (2, 5)], (2, 3, 2)),
}
EVERY = pytest.mark.parametrize(("span", "shapes", "modes"), CASES.values(), ids=CASES)


def moment(n: int, seed: int) -> Tensor:
    return moments.moment(n, seed, 3 * n)


def parts_of(shapes: list[tuple[int, int]], seed: int = 7) -> list[Tensor]:
    return [random(*shape, seed=seed + k) for k, shape in enumerate(shapes)]


def metrics(rows: int, columns: int) -> dict[str, Metric]:
    c, s = moment(columns, 1), moment(rows, 2)
    return {"none": Metric(), "both": Metric(c, s), "diagonals": Metric(c.diagonal(), s.diagonal()), "C": Metric(c)}


@EVERY
def test_products_and_gradients_are_those_of_the_dense_factor(
    span: Span, shapes: list[tuple[int, int]], modes: tuple[int, ...]
) -> None:
    leaves = [part.requires_grad_() for part in parts_of(shapes)]
    z = span.dense(leaves)
    matrix = random(6, len(z), seed=3)
    assert torch.allclose(span.times(matrix, leaves), matrix @ z)
    slope = random(6, z.shape[1], seed=4)
    expected = torch.autograd.grad((matrix @ z * slope).sum(), leaves)
    for ours, theirs in zip(span.pullback(matrix, slope, leaves), expected, strict=True):
        assert torch.allclose(ours, theirs)


@EVERY
def test_the_curvatures_are_those_of_the_product(
    span: Span, shapes: list[tuple[int, int]], modes: tuple[int, ...]
) -> None:
    """Half the second derivative of |X Z^T|^2 by one entry is |X times the change of Z|^2."""
    parts = parts_of(shapes)
    x = random(6, span.dense(parts).shape[1], seed=4)
    for k, curvature in enumerate(span.curvatures(x.square().sum(0), parts)):
        for place in ((0, 0), (parts[k].shape[0] - 1, 1)):
            moved = [part.clone() for part in parts]
            moved[k][place] += 1
            change = x @ (span.dense(moved) - span.dense(parts)).T
            assert float(curvature[place]) == pytest.approx(float(change.square().sum()))


@EVERY
@pytest.mark.parametrize("kind", ["none", "both", "diagonals", "C"])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_solution_has_the_error_that_it_claims(
    span: Span, shapes: list[tuple[int, int]], modes: tuple[int, ...], kind: str, rank: int | None
) -> None:
    columns = span.dense(parts_of(shapes)).shape[0]
    weight, metric = random(6, columns), metrics(6, columns)[kind]
    problem = row_space_problem(weight, metric, span, modes)
    assert problem.size == pytest.approx(metric.squared_error(weight), rel=1e-9)
    parts = problem.whiten(parts_of(shapes))
    found = problem.solve(parts, rank)
    back, x = problem.unwhiten(parts, found.x)
    for ours, theirs in zip(back, parts_of(shapes), strict=True):
        assert torch.allclose(ours, theirs)
    gap = weight - x @ span.dense(back).T
    assert found.value == pytest.approx(metric.squared_error(gap), rel=1e-7)
    z, generator = span.dense(back), torch.Generator().manual_seed(5)
    for _ in range(5):  # no X nearby is better
        other = x + 1e-3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if rank is not None:
            u, s, v = torch.linalg.svd(other, full_matrices=False)
            other = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert metric.squared_error(weight - other @ z.T) >= found.value * (1 - 1e-9)


@EVERY
@pytest.mark.parametrize("rank", [None, 2])
def test_refinement_follows_the_gradient_to_a_stationary_point(
    span: Span, shapes: list[tuple[int, int]], modes: tuple[int, ...], rank: int | None
) -> None:
    columns = span.dense(parts_of(shapes)).shape[0]
    problem = row_space_problem(random(6, columns), metrics(6, columns)["both"], span, modes)
    start = parts_of(shapes)
    few, many = problem.refine(start, rank, 2), problem.refine(start, rank, 500)
    errors = [problem.error(parts, rank) for parts in (start, few, many)]
    assert errors[0] > errors[1] >= errors[2]
    generator = torch.Generator().manual_seed(6)
    for _ in range(5):
        nearby = [p + 1e-4 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in many]
        assert problem.error(nearby, rank) >= errors[2] * (1 - 1e-4)


def test_what_the_leading_columns_reach_is_told_by_one_factorisation() -> None:
    span, metric = RepeatedSpan(3), metrics(6, 12)["both"]
    problem = row_space_problem(random(6, 12), metric, span, (4, 3))
    basis = torch.linalg.qr(random(4, 4, seed=9)).Q
    reached = problem.reached([basis])
    for columns in (1, 2, 4):
        error = problem.error([basis[:, :columns]])
        assert problem.size - float(reached[: columns * 3].square().sum()) == pytest.approx(error, rel=1e-6, abs=1e-9)


def test_a_singular_system_is_solved() -> None:
    span = KhatriRaoSpan()
    problem = row_space_problem(random(3, 8), Metric(), span, (4, 2))
    same = [random(4, 1).expand(4, 3).contiguous(), random(2, 1).expand(2, 3).contiguous()]
    once = problem.error([part[:, :1] for part in same])
    assert problem.error(same) == pytest.approx(once, rel=1e-6)
    zero = [torch.zeros(4, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)]
    found = problem.solve(zero)
    assert bool(torch.isfinite(found.x).all())
    assert found.value == pytest.approx(problem.size)
