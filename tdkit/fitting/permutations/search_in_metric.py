"""Row and column orders under which a matrix is near to a sum of Kronecker products in a calibrated metric."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdkit.fitting.linalg import restore, working
from tdkit.fitting.metric import Metric
from tdkit.fitting.permutations.search import Ordering, search
from tdkit.fitting.train_in_metric import kronecker_in_metric
from tdkit.shapes import Shape

SEARCHED_TERMS = 32  # with more, the plain search finds nothing that the metric rewards


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
    """The best of a few orders, each fitted in the metric; never worse than the order as it stands.

    The orders are the matrix as it stands, rows and columns by their weight in the metric, and for few terms
    the one that is best in the Frobenius norm. The first is always fitted to the end, the others only where
    the start of their fit is no worse than its own.

    Args:
        weight: (out, in), any float dtype.
        metric: S and C.
        a, b, terms: factor shapes and their number.
        rows, columns: whether they may be reordered.
        seed: of the search in the Frobenius norm.

    Returns:
        the ordering; its `energy` is tr(S W C W^T) less the error.
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
