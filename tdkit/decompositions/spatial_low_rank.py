"""W[o, i, h, w] = sum_r left[o, r, w] right[r, i, h]: a convolution along one axis after one along the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, FactorizedMatrix, Point, assign, factor
from tdkit.decompositions.error_curve import corrected_curve, exact_curve, lowest
from tdkit.decompositions.options import positive
from tdkit.errors import OptionError
from tdkit.fitting.linalg import leading
from tdkit.fitting.metric import Metric
from tdkit.fitting.tucker import TuckerErrors, fit_tucker
from tdkit.products.convolution import Stage
from tdkit.shapes import Shape, by


class SpatialLowRankMatrix(FactorizedMatrix):
    """right (rank, in, first kernel size) and left (out, rank, second kernel size)."""

    def __init__(
        self,
        decomposition: Decomposition,
        sizes: Shape,
        rank: int,
        first: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(decomposition, sizes)
        self.first = first
        self.left = factor(sizes[0], rank, sizes[3 - first], device=device, dtype=dtype)
        self.right = factor(rank, sizes[1], sizes[2 + first], device=device, dtype=dtype)

    def dense(self) -> Tensor:
        axes = "orw,rih->oihw" if self.first == 0 else "orh,riw->oihw"
        return torch.einsum(axes, self.left, self.right).flatten(1)

    def multiply_adds(self) -> int:
        """Multiply-adds of the two convolutions for one position of each."""
        return self.params

    def convolutions(self, kernel: tuple[int, ...], groups: int) -> list[Stage] | None:
        """One axis of the kernel to `rank`, then the other. Source: Jaderberg et al. (2014), section 2.1."""
        if self.sizes[2:] != kernel:
            return None
        first, second = self.first, 1 - self.first
        right, left = self.right.unsqueeze(2 + second), self.left.unsqueeze(2 + first)
        return [Stage(right, axes=(first,), leading=groups), Stage(left, axes=(second,), groups=groups)]


@dataclass(frozen=True, kw_only=True)
class SpatialLowRank(Decomposition):
    """A kernel kh x kw as kh x 1 to `rank` channels and 1 x kw after it, or the reverse.

    Without a metric the fit is the optimum, a truncated SVD of the weight as a matrix (in * kh, out * kw).

    Args:
        rank: channels between the two; left open, the budget chooses it.
        first: the spatial axis of the first convolution, 0 or 1; left open, the first one, or for an error curve the
            one with the smaller error.

    Source: Jaderberg et al. (2014), "Speeding up convolutional neural networks with low rank expansions", scheme 2.
    """

    name: ClassVar[str] = "spatial_low_rank"
    orders: ClassVar[frozenset[int]] = frozenset({4})
    rank: int | None = None
    first: int | None = None

    def __post_init__(self) -> None:
        positive(self.name, "rank", self.rank)
        if self.first is not None and (isinstance(self.first, bool) or self.first not in (0, 1)):
            raise OptionError(f"{self.name}: first={self.first!r} must be 0 or 1, one of the two spatial axes")

    def is_complete(self) -> bool:
        return self.rank is not None

    def candidates(self, shape: Shape) -> list[Self]:
        """The ranks that pay, and the full one, which is exact."""
        full = self._full_rank(shape)
        if self.rank is not None:
            return [self]
        paying = min((math.prod(shape) - 1) // self._params_per_rank(shape), full - 1)
        return [replace(self, rank=rank) for rank in (*range(1, paying + 1), full)]

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        if self.rank is not None:
            return super().complete(shape, max_params)
        rank = min(max_params // self._params_per_rank(shape), self._full_rank(shape))
        return replace(self, rank=rank) if rank else None

    def best_within(self, weight: Tensor, metric: Metric | None, max_params: int) -> Decomposition | None:
        """The richest choice, along the axes that have the smaller error."""
        shape = tuple(weight.shape)
        if weight.is_meta or self.first is not None:
            return self.complete(shape, max_params)
        points = [point for point in self.curve(weight, metric) if point.params <= max_params]
        return points[-1].decomposition if points else self.complete(shape, max_params)

    def num_params(self, shape: Shape) -> int:
        return self._closed_rank(shape) * self._params_per_rank(shape)

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SpatialLowRankMatrix:
        rank = self._closed_rank(shape)
        return SpatialLowRankMatrix(self, shape, rank, self.first or 0, device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> SpatialLowRankMatrix:
        rank, first = self._closed_rank(tuple(weight.shape)), self.first or 0
        matrix = self.empty(tuple(weight.shape), device=weight.device, dtype=weight.dtype)
        found = fit_tucker(*_along(weight, metric, first), rank)
        out, inner, height = found.core.shape[0], weight.shape[1], weight.shape[2 + first]
        left = found.core.transpose(0, 1).flatten(1)  # (rank, out * width)
        turn, squares = leading(left @ left.T, rank)  # an SVD, of which each factor gets the roots of the values
        level = squares.clamp_min(float(squares[0]) * 1e-16 + torch.finfo(squares.dtype).tiny) ** 0.25
        assign(matrix.left, (turn.T @ left / level[:, None]).reshape(rank, out, -1).transpose(0, 1))
        assign(matrix.right, ((found.inner @ turn) * level).T.reshape(rank, inner, height))
        return matrix

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        """See `Decomposition.curve`.

        One factorisation for each order of the axes gives every point. In a metric it is the error of the closed form
        that starts `fit`, lowered as that of a few points falls in a few steps; `fit` does no worse. Points for which
        these steps take long, of matrices of thousands of columns, are lowered as the nearest one.
        """
        shape = tuple(weight.shape)
        points: list[Point] = []
        self._full_rank(shape)
        spans: dict[int, TuckerErrors] = {}
        for first in (0, 1) if self.first is None else (self.first,):
            kind = replace(self, first=first)
            smaller = [(c.num_params(shape), c) for c in kind.candidates(shape)]
            smaller = [(params, c) for params, c in smaller if params < weight.numel()]
            if smaller:
                spans[first] = TuckerErrors.of(*_along(weight, metric, first), most=smaller[-1][1].rank)
                errors = spans[first].span_bounds().tolist()
                points += exact_curve(smaller, [errors[(c.rank or 1) - 1] for _, c in smaller])
        points = lowest(points)
        if metric is None:
            return points

        def refined(kind: Decomposition) -> float | None:
            assert isinstance(kind, SpatialLowRank)
            return spans[kind.first or 0].refined(kind.rank or 1)

        return corrected_curve(points, refined)

    def _full_rank(self, shape: Shape) -> int:
        out, inner, *kernel = self.shape_of(shape)
        first = self.first or 0
        full = min(inner * kernel[first], out * kernel[1 - first])
        if self.rank is not None and self.rank > full:
            raise OptionError(
                f"{self.name}: rank={self.rank} is above the full rank {full} of a {by(shape)} weight with the axis "
                f"{first} first"
            )
        return full

    def _params_per_rank(self, shape: Shape) -> int:
        first = self.first or 0
        return shape[0] * shape[3 - first] + shape[1] * shape[2 + first]

    def _closed_rank(self, shape: Shape) -> int:
        self._full_rank(shape)
        if self.rank is None:
            raise OptionError(f"{self.describe()}: give a rank, or a budget that chooses it")
        return self.rank


def _along(
    weight: Tensor,  # (out, in, kh, kw)
    metric: Metric | None,
    first: int,
) -> tuple[Tensor, Metric]:  # weight (out, in * first kernel size, second kernel size)
    """The weight with the axis `first` before the other one, and the metric of that order of the columns."""
    metric = metric or Metric()
    out, inner, height, width = weight.shape
    if first == 0:
        return weight.reshape(out, inner * height, width), metric
    columns = torch.arange(inner * height * width).reshape(inner, height, width).transpose(1, 2).flatten()
    turned = weight.transpose(2, 3).reshape(out, inner * width, height)
    return turned, metric.reordered(torch.arange(out), columns)
