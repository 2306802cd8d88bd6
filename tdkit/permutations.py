"""The search for row and column orders under which a matrix is nearest to a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.linalg import nearest_kronecker, restore
from tdkit.shapes import Shape

MAX_ROUNDS = 15
TOLERANCE = 1e-6  # of the matrix's energy: an alternation that gains less has converged


@dataclass(frozen=True)
class Ordering:
    """``matrix[rows][:, columns]`` is near ``sum_r a[r] kron b[r]``; `energy` is the squared norm it keeps."""

    rows: Tensor  # (out,) int64
    columns: Tensor  # (in,) int64
    a: Tensor  # (terms, a1, a2)
    b: Tensor  # (terms, b1, b2)
    energy: float


def search(
    matrix: Tensor,  # (out, in) float64
    a: Shape,
    b: Shape,
    terms: int,
    *,
    rows: bool = True,
    columns: bool = True,
    seed: int = 0,
) -> Ordering:
    """The best ordering found from several starts, the identity first, each improved by alternation.

    Every step is monotone: the Kronecker fit is optimal for an ordering, and for fixed factors the best
    order of the rows (then of the columns) is a linear assignment. So the result is never worse than
    `nearest_kronecker` on the matrix as it stands. Deterministic for a seed.

    Source: alternation of an exact fit with exact assignments; the permuted form is that of Abronin et
    al., TQCompressor (2024), section 3.
    """
    best: Ordering | None = None
    for start_rows, start_columns in _starts(matrix, rows, columns, seed):
        found = _alternate(matrix, a, b, terms, start_rows, start_columns, rows, columns)
        if best is None or found.energy > best.energy:
            best = found
    assert best is not None
    return best


def _starts(matrix: Tensor, rows: bool, columns: bool, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    out_order = torch.arange(matrix.shape[0])
    in_order = torch.arange(matrix.shape[1])
    yield out_order, in_order
    by_norm = matrix.cpu()
    yield (
        by_norm.norm(dim=1).argsort(descending=True, stable=True) if rows else out_order,
        by_norm.norm(dim=0).argsort(descending=True, stable=True) if columns else in_order,
    )


def _alternate(
    matrix: Tensor, a: Shape, b: Shape, terms: int, rows: Tensor, columns: Tensor, move_rows: bool, move_columns: bool
) -> Ordering:
    total = float(matrix.square().sum())
    current = _fit(matrix, a, b, terms, rows, columns)
    for _ in range(MAX_ROUNDS):
        approximation = restore(current.a.flatten(1).T @ current.b.flatten(1), a, b)
        rows, columns = current.rows, current.columns
        if move_rows:
            rows = _assign(approximation @ matrix[:, columns].T)
        if move_columns:
            columns = _assign(approximation.T @ matrix[rows])
        improved = _fit(matrix, a, b, terms, rows, columns)
        if improved.energy <= current.energy + TOLERANCE * total:
            return max(current, improved, key=lambda o: o.energy)
        current = improved
    return current


def _assign(gain: Tensor) -> Tensor:
    """For each place (row of `gain`) the item (column) so that the summed gain is largest."""
    from scipy.optimize import linear_sum_assignment  # here: importing tdkit must stay quick

    return torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1])


def _fit(matrix: Tensor, a: Shape, b: Shape, terms: int, rows: Tensor, columns: Tensor) -> Ordering:
    factor_a, factor_b = nearest_kronecker(matrix[rows][:, columns], a, b, terms)
    gram_a = factor_a.flatten(1) @ factor_a.flatten(1).T
    gram_b = factor_b.flatten(1) @ factor_b.flatten(1).T
    return Ordering(rows, columns, factor_a, factor_b, float((gram_a * gram_b).sum()))
