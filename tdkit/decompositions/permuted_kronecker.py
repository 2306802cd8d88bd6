"""W = P (sum_r A_r kron B_r) Q: a sum of Kronecker products of the matrix with its rows and columns reordered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Point, assign
from tdkit.decompositions.kronecker import Kronecker, KroneckerMatrix
from tdkit.errors import OptionError
from tdkit.fitting.linalg import working
from tdkit.fitting.metric import Metric
from tdkit.fitting.permutations.search import search
from tdkit.fitting.permutations.search_in_metric import search_in_metric
from tdkit.products.autograd import reorder
from tdkit.products.cached_tensor import CachedTensor
from tdkit.products.convolution import Stage
from tdkit.products.cost import FUSED, Path
from tdkit.shapes import Shape
from tdkit.support.compatibility import buffers_of


class PermutedKroneckerMatrix(KroneckerMatrix):
    """A `KroneckerMatrix` with integer buffers: W[i, j] = K[row_order[i], column_order[j]].

    ``column_source`` is the inverse of the column order, by which x is gathered.
    """

    row_order: Tensor | None
    column_source: Tensor | None

    def __init__(
        self,
        decomposition: Decomposition,
        shape: Shape,
        terms: int,
        a: Shape,
        b: Shape,
        *,
        rows: bool,
        columns: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(decomposition, shape, terms, a, b, device=device, dtype=dtype)
        self.register_buffer("row_order", _in_order(shape[0], device) if rows else None)
        self.register_buffer("column_source", _in_order(shape[1], device) if columns else None)
        self._row_target = CachedTensor()  # the inverse of the row order

    def fault(self, tensors: Mapping[str, Tensor]) -> str | None:
        found = super().fault(tensors)
        for name in ("row_order", "column_source"):
            order = tensors.get(name)
            if (
                found is None
                and order is not None
                and not bool((order.sort().values == _in_order(len(order), None)).all())
            ):
                found = f"{name} is no permutation of 0 to {len(order) - 1}"
        return found

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.factors(), *(order for order in buffers_of(self).values() if order is not None))

    def dense(self) -> Tensor:
        dense = super().dense()
        if self.row_order is not None:
            dense = dense.index_select(0, self.row_order)
        if self.column_source is not None:
            dense = dense.index_select(1, self.column_source.argsort())
        return dense

    def paths(self, tokens: int) -> tuple[Path, ...]:
        moved = tokens * sum(order.numel() for order in (self.row_order, self.column_source) if order is not None)
        return tuple(
            path if path.name == FUSED else replace(path, calls=path.calls + 2, moved=path.moved + moved)
            for path in super().paths(tokens)
        )

    def by_factors(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor:
        x = x if self.column_source is None else reorder(x, self.column_source)
        if self.row_order is None:
            return super().by_factors(x, bias, path)
        y = reorder(super().by_factors(x, None, path), self.row_order)
        return y if bias is None else y + bias.to(y.dtype)

    def orders(self) -> tuple[Tensor | None, Tensor | None]:
        rows = self.row_order
        if rows is None:
            return self.column_source, None
        target = self._row_target.get((rows,), rows.dtype, rows.argsort)
        return self.column_source, rows.argsort() if target is None else target

    def rows(self, ids: Tensor) -> Tensor:
        rows = super().rows(ids if self.row_order is None else self.row_order[ids].long())
        return rows if self.column_source is None else rows.index_select(-1, self.column_source.argsort())

    def convolutions(self, kernel: tuple[int, ...], groups: int) -> list[Stage] | None:
        """Those of the Kronecker sum where nothing is reordered; None otherwise: an order mixes positions."""
        if self.row_order is not None or self.column_source is not None:
            return None
        return super().convolutions(kernel, groups)


def _in_order(size: int, device: torch.device | str | None) -> Tensor:
    with torch.inference_mode(False):  # as `factor`
        return torch.arange(size, dtype=torch.int32, device=device)


@dataclass(frozen=True, kw_only=True)
class PermutedKronecker(Kronecker):
    """A sum of Kronecker products of the matrix with rows and columns in the best order found.

    Never worse in the Frobenius norm than `Kronecker` with the same terms and factor shapes. The orders
    are integer buffers, reported apart from the parameters.

    Args:
        terms: number of products; left open, the budget chooses it.
        a: (rows, columns) of the factors A, as for `Kronecker`.
        b: (rows, columns) of the factors B, as for `Kronecker`.
        rows: whether rows may be reordered.
        cols: whether columns may be reordered.
        seed: of the random starts of the search.

    Source: Abronin et al., TQCompressor (2024), section 3; the search is ours (`tdkit.fitting.permutations`).
    """

    name: ClassVar[str] = "permuted_kronecker"
    rows: bool = True
    cols: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("rows", "cols"):
            if not isinstance(getattr(self, option), bool):
                raise OptionError(f"{self.name}: {option}={getattr(self, option)!r} must be true or false")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise OptionError(f"{self.name}: seed={self.seed!r} must be an integer of at least 0")

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PermutedKroneckerMatrix:
        terms, a, b = self._closed(shape)
        return PermutedKroneckerMatrix(
            self, shape, terms, a, b, rows=self.rows, columns=self.cols, device=device, dtype=dtype
        )

    def fit(self, weight: Tensor, metric: Metric | None = None) -> PermutedKroneckerMatrix:
        shape = (weight.shape[0], weight.shape[1])
        matrix = self.empty(shape, device=weight.device, dtype=weight.dtype)
        terms, a, b = self._closed(shape)
        if metric is None:
            found = search(working(weight), a, b, terms, rows=self.rows, columns=self.cols, seed=self.seed)
        else:
            found = search_in_metric(weight, metric, a, b, terms, rows=self.rows, columns=self.cols, seed=self.seed)
        assign(matrix.a, found.a)
        assign(matrix.b, found.b)
        if matrix.row_order is not None:  # weight[rows][:, columns] = K, so W[i, j] = K[rows^-1[i], columns^-1[j]]
            assign(matrix.row_order, found.rows.argsort())
        if matrix.column_source is not None:
            assign(matrix.column_source, found.columns)
        return matrix

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        """See `Decomposition.curve`; in the metric that of `Kronecker`, than which `fit` is never worse."""
        if metric is None:
            return Decomposition.curve(self, weight)
        return super().curve(weight, metric)
