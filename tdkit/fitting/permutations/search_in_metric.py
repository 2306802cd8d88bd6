"""Row and column permutations for a sum of Kronecker products fitted in a calibrated metric."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdkit.fitting.linalg import restore, working
from tdkit.fitting.metric import Metric
from tdkit.fitting.permutations.search import Ordering, search
from tdkit.fitting.train_in_metric import kronecker_in_metric
from tdkit.shapes import Shape

# Tuned by hand; `python tests/benchmarks/accuracy.py --run FOLDER --rows 'permuted_kronecker/*'` measures a change.
SEARCHED_TERMS = 32  # most terms for which the order of the plain search is tried


def search_in_metric(
    weight: Tensor,
    metric: Metric,
    a: Shape,
    b: Shape,
    terms: int,
    *,
    rows: bool = True,
    columns: bool = True,
    seed: int = 0,
) -> Ordering:
    """The best of a few orderings, each fitted in the metric; never worse than the given order.

    The candidates are the given order, rows and columns sorted by their share of tr(S W C W^T) and, for few terms,
    the result of `search` in the Frobenius norm. A candidate is skipped if the closed form that its fit starts from is
    worse than that of the given order.

    Args:
        weight: (a[0] * b[0], a[1] * b[1]), any float dtype.
        metric: S and C.
        a, b, terms: shapes of the factors and their number.
        rows, columns: whether they may be reordered.
        seed: of `search`.

    Returns:
        The ordering, float64; its `energy` is tr(S W C W^T) less the squared error.
    """
    weight = working(weight)
    size = metric.squared_error(weight)
    best: Ordering | None = None
    bar = float("inf")
    for row_order, column_order in _orders(weight, metric, a, b, terms, rows, columns, seed):
        moved, moved_metric = weight[row_order][:, column_order], metric.reordered(row_order, column_order)
        start = _error(moved, moved_metric, kronecker_in_metric(moved, moved_metric, a, b, terms, steps=0), a, b)
        if start > bar:
            continue
        if best is None:
            bar = start
        factors = kronecker_in_metric(moved, moved_metric, a, b, terms)
        energy = size - _error(moved, moved_metric, factors, a, b)
        if best is None or energy > best.energy:
            best = Ordering(row_order, column_order, *factors, energy)
    assert best is not None
    return best


def _orders(
    weight: Tensor, metric: Metric, a: Shape, b: Shape, terms: int, rows: bool, columns: bool, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    as_rows = torch.arange(weight.shape[0], device=weight.device)
    as_columns = torch.arange(weight.shape[1], device=weight.device)
    yield as_rows, as_columns
    if not (rows or columns):
        return
    share = weight * metric.weighted(weight)  # of each entry in tr(S W C W^T)
    yield (
        share.sum(1).argsort(descending=True, stable=True) if rows else as_rows,
        share.sum(0).argsort(descending=True, stable=True) if columns else as_columns,
    )
    if terms <= SEARCHED_TERMS:
        found = search(weight, a, b, terms, rows=rows, columns=columns, seed=seed)
        yield found.rows.to(weight.device), found.columns.to(weight.device)


def _error(weight: Tensor, metric: Metric, factors: tuple[Tensor, Tensor], a: Shape, b: Shape) -> float:
    return metric.squared_error(weight - restore(factors[0].flatten(1).T @ factors[1].flatten(1), a, b))
