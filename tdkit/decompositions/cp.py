"""W = sum_r a_r o b_r o k_r ...: a canonical polyadic decomposition, one vector for each mode of each term."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, FactorizedMatrix, Point, assign, factor
from tdkit.decompositions.error_curve import SHARES, anchored, exact_curve, sampled_curve
from tdkit.decompositions.options import positive
from tdkit.decompositions.tt_matrix import Cores
from tdkit.errors import OptionError
from tdkit.fitting.canonical_polyadic import cp_errors, fit_cp, full_rank
from tdkit.fitting.metric import Metric
from tdkit.products.convolution import Stage, pointwise
from tdkit.shapes import Shape, by
from tdkit.support.compatibility import static_shape, submodules_of

LARGE = 1 << 14  # entries of the weight from which an error curve takes `FEW_SHARES`
FEW_SHARES = (0.1, 0.3, 0.5, 0.75)  # of the dense size, at which to fit large weights for an error curve


class CPMatrix(FactorizedMatrix):
    """One factor (size, rank) for each mode of the weight (out, in, *kernel)."""

    def __init__(
        self,
        decomposition: Decomposition,
        sizes: Shape,
        rank: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(decomposition, sizes)
        self.modes = Cores(factor(size, rank, device=device, dtype=dtype) for size in sizes)

    def factors(self) -> tuple[Tensor, ...]:
        """Those of the output channels, of the input channels and of each spatial axis."""
        factors: tuple[Tensor, ...] = submodules_of(self)["modes"]()
        return factors

    def dense(self) -> Tensor:
        out, columns, *kernel = self.factors()
        for each in kernel:
            columns = (columns[:, None] * each).flatten(0, 1)
        return out @ columns.T

    def multiply_adds(self) -> int:
        """Multiply-adds of the chain of convolutions for one position of each."""
        return self.params

    def convolutions(self, kernel: tuple[int, ...], groups: int) -> list[Stage] | None:
        """1 x 1 to `rank`, each axis of the kernel for each channel, and 1 x 1. Source: Lebedev et al. (2015)."""
        if self.sizes[2:] != kernel:
            return None
        out, inner, *axes = self.factors()
        count, rank = len(kernel), static_shape(out)[1]
        middle = [
            Stage(
                each.T.reshape(rank, 1, *[size if other == axis else 1 for other in range(count)]),
                axes=(axis,),
                groups=rank,
                leading=groups,
            )
            for axis, (each, size) in enumerate(zip(axes, kernel, strict=True))
        ]
        return [
            Stage(pointwise(inner.T, count), leading=groups),
            *middle,
            Stage(pointwise(out, count), groups=groups),
        ]


@dataclass(frozen=True, kw_only=True)
class CanonicalPolyadic(Decomposition):
    """A sum of `rank` outer products of vectors, one for each mode of the weight.

    As convolutions these are 1 x 1 to `rank` channels, one along each axis for each channel by itself, and 1 x 1.

    Args:
        rank: number of terms; left open, the budget chooses it.

    Source: Lebedev et al. (2015), "Speeding-up convolutional neural networks using fine-tuned CP-decomposition". The
    fit in a calibrated metric is ours (`tdkit.fitting.canonical_polyadic`).
    """

    name: ClassVar[str] = "cp"
    orders: ClassVar[frozenset[int]] = frozenset({3, 4, 5})
    rank: int | None = None

    def __post_init__(self) -> None:
        positive(self.name, "rank", self.rank)

    def candidates(self, shape: Shape) -> list[Self]:
        """The ranks that pay, and the full one, which is exact."""
        full = self._full_rank(shape)
        if self.rank is not None:
            return [self]
        paying = min((math.prod(shape) - 1) // sum(shape), full - 1)
        return [replace(self, rank=rank) for rank in (*range(1, paying + 1), full)]

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        if self.rank is not None:
            return super().complete(shape, max_params)
        rank = min(max_params // sum(shape), self._full_rank(shape))
        return replace(self, rank=rank) if rank else None

    def num_params(self, shape: Shape) -> int:
        return self._closed_rank(shape) * sum(shape)

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CPMatrix:
        return CPMatrix(self, shape, self._closed_rank(shape), device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> CPMatrix:
        matrix = self.empty(tuple(weight.shape), device=weight.device, dtype=weight.dtype)
        found = fit_cp(weight, metric or Metric(), self._closed_rank(tuple(weight.shape)))
        for parameter, value in zip(matrix.factors(), found, strict=True):
            assign(parameter, value)
        return matrix

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        """See `Decomposition.curve`.

        A few points are fitted, in the metric with few steps, so that `fit` does no worse; then others lie between
        them.
        """
        shape, size = tuple(weight.shape), weight.numel()
        shares = SHARES if size < LARGE else FEW_SHARES
        smaller = [(c.num_params(shape), c) for c in self.candidates(shape)]
        smaller = [(params, c) for params, c in smaller if params < size]
        if metric is None:
            few = [smaller[place] for place in anchored([params for params, _ in smaller], size, shares)]
            return exact_curve(few, [kind.squared_error(weight) for _, kind in few])

        def errors(params: list[int]) -> list[float]:
            return cp_errors(weight, metric, [count // sum(shape) for count in params])

        return sampled_curve(smaller, size, errors, shares)

    def _full_rank(self, shape: Shape) -> int:
        full = full_rank(self.shape_of(shape))
        if self.rank is not None and self.rank > full:
            raise OptionError(f"cp: rank={self.rank} is above {full}, at which a {by(shape)} weight is exact")
        return full

    def _closed_rank(self, shape: Shape) -> int:
        self._full_rank(shape)
        if self.rank is None:
            raise OptionError("cp: give a rank, or a budget that chooses it")
        return self.rank
