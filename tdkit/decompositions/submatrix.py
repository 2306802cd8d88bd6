"""W zero but for some rows and columns: a smaller dense matrix between a gather and a scatter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.decompositions.base import Decomposition, FactorizedMatrix, Point, assign, factor
from tdkit.decompositions.error_curve import exact_curve
from tdkit.decompositions.options import positive
from tdkit.errors import OptionError
from tdkit.fitting.elimination import eliminate, refitted
from tdkit.fitting.linalg import working
from tdkit.fitting.metric import Metric
from tdkit.shapes import Shape, by


class SubmatrixMatrix(FactorizedMatrix):
    """``weight`` (kept rows, kept columns) at the rows ``row_places`` and the columns ``column_places``, else zero.

    The places are integer buffers, ascending; None where all rows, or columns, are kept.
    """

    row_places: Tensor | None
    column_places: Tensor | None

    def __init__(
        self, decomposition: Submatrix, shape: Shape, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__(decomposition, shape)
        rows, columns = decomposition.rows, decomposition.columns
        self.weight = factor(rows or shape[0], columns or shape[1], device=device, dtype=dtype)
        for name, count in (("row_places", rows), ("column_places", columns)):
            self.register_buffer(name, None if count is None else torch.arange(count, device=device))

    def fault(self, tensors: Mapping[str, Tensor]) -> str | None:
        found = super().fault(tensors)
        for name, size in (("row_places", self.shape[0]), ("column_places", self.shape[1])):
            places = tensors.get(name)
            if found is None and places is not None and places.numel():
                ascending = bool((places.diff() > 0).all()) and int(places[0]) >= 0 and int(places[-1]) < size
                found = None if ascending else f"{name} does not rise from 0 to at most {size - 1}"
        return found

    def dense(self) -> Tensor:
        dense = self._scattered(self.weight.T, self.shape[0]).T
        if self.column_places is None:
            return dense
        return dense.new_zeros(self.shape).index_copy(1, self.column_places, dense)

    def matmul(self, x: Tensor) -> Tensor:
        return self._scattered(F.linear(self._gathered(x), self.weight), self.shape[0])

    def multiply_adds(self) -> int:
        return self.weight.numel()

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.dense())

    def _gathered(self, x: Tensor) -> Tensor:
        return x if self.column_places is None else x.index_select(-1, self.column_places)

    def _scattered(self, y: Tensor, size: int) -> Tensor:
        """Returns y (\\*batch, kept) with zeros between, (\\*batch, size)."""
        if self.row_places is None:
            return y
        return y.new_zeros(*y.shape[:-1], size).index_copy(-1, self.row_places, y)


@dataclass(frozen=True, kw_only=True)
class Submatrix(Decomposition):
    """Some columns of a weight, refitted to take over what they can of the others, or some of its rows.

    Columns are removed as in `tdkit.fitting.elimination.eliminate`, and so are rows, of the transposed weight. Where
    several weights share hidden units, `Shrink` removes these from all of them.

    Args:
        rows: how many rows are kept; all when None.
        columns: how many columns are kept; if `rows` is None too, the budget chooses it.

    Source: Hassibi and Stork (1993), section 3.
    """

    name: ClassVar[str] = "submatrix"
    rows: int | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        positive(self.name, "rows", self.rows)
        positive(self.name, "columns", self.columns)

    def is_complete(self) -> bool:
        return self.rows is not None or self.columns is not None

    def candidates(self, shape: Shape) -> list[Self]:
        if not self.is_complete():
            return [replace(self, columns=columns) for columns in range(1, shape[1] + 1)]
        for what, count, most in (("rows", self.rows, shape[0]), ("columns", self.columns, shape[1])):
            if count is not None and count > most:
                raise OptionError(f"submatrix: {what}={count} is more than a {by(shape)} matrix has")
        return [self]

    def num_params(self, shape: Shape) -> int:
        self._check_complete(shape)
        return (self.rows or shape[0]) * (self.columns or shape[1])

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        if self.is_complete():
            return super().complete(shape, max_params)
        columns = min(max_params // shape[0], shape[1])
        return replace(self, columns=columns) if columns else None

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SubmatrixMatrix:
        self._check_complete(shape)
        return SubmatrixMatrix(self, shape, device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> SubmatrixMatrix:
        metric = metric or Metric()
        small, rows, columns = working(weight), None, None
        self._check_complete((weight.shape[0], weight.shape[1]))
        if self.columns is not None:
            columns = eliminate(small, metric).kept(self.columns)
            small = refitted(small, metric, columns)
        if self.rows is not None:
            turned = Metric(metric.output, None if columns is not None else metric.input)
            rows = eliminate(small.T, turned).kept(self.rows)
            small = refitted(small.T, turned, rows).T
        return self.holding(small, tuple(weight.shape), rows, columns, weight)

    def holding(
        self, small: Tensor, shape: Shape, rows: Tensor | None, columns: Tensor | None, like: Tensor
    ) -> SubmatrixMatrix:
        """Returns the matrix with given entries and places, of the dtype and on the device of the tensor `like`."""
        matrix = self.empty(shape, device=like.device, dtype=like.dtype)
        assign(matrix.weight, small)
        for buffer, places in ((matrix.row_places, rows), (matrix.column_places, columns)):
            if buffer is not None and places is not None:
                buffer.copy_(places)
        return matrix

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        shape = (weight.shape[0], weight.shape[1])
        if self.is_complete():
            return super().curve(weight, metric)
        found = eliminate(weight, metric or Metric())
        smaller = [(columns * shape[0], replace(self, columns=columns)) for columns in range(1, shape[1])]
        return exact_curve(smaller, [found.error(columns) for columns in range(1, shape[1])])

    def _check_complete(self, shape: Shape) -> None:
        if not self.is_complete():
            raise OptionError("submatrix: rows and columns are open: a plan with a budget chooses the columns")
        self.candidates(shape)
