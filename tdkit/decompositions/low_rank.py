"""W = left right: the truncated singular value decomposition, plain or in a calibrated metric."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.decompositions.base import Decomposition, Point, assign, factor
from tdkit.decompositions.error_curve import exact_curve
from tdkit.decompositions.options import positive
from tdkit.decompositions.structured_matrix import StructuredMatrix
from tdkit.errors import OptionError
from tdkit.fitting.low_rank import squared_singular_values, truncated_in_metric
from tdkit.fitting.metric import Metric
from tdkit.products import onednn
from tdkit.products.autograd import autocast_dtype
from tdkit.products.convolution import Stage, pointwise
from tdkit.products.cost import DENSE, Path
from tdkit.products.low_rank import LowRankStructure, padded_rank, padding_pays
from tdkit.shapes import Shape
from tdkit.support.compatibility import parameters_of


class LowRankMatrix(StructuredMatrix):
    """left (out, rank) times right (rank, in)."""

    structure: LowRankStructure

    def __init__(
        self,
        decomposition: LowRank,
        shape: Shape,
        rank: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(decomposition, LowRankStructure(shape, rank))
        self.left = factor(shape[0], rank, axes=(1, 0), device=device, dtype=dtype)  # the longer side is read along
        self.right = factor(rank, shape[1], device=device, dtype=dtype)
        self._padded = self.dispatcher.new_cache()  # both factors end to end

    def factors(self) -> tuple[Tensor, ...]:
        parameters = parameters_of(self)
        try:
            return parameters["left"], parameters["right"]
        except KeyError:  # one has a parametrization
            return self.left, self.right

    def fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        from tdkit.products.kernels.low_rank import low_rank_pair  # imports Triton

        left, right = self.factors()
        return low_rank_pair(x, left, right, bias)

    def by_factors(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor:
        both = self._both_padded(x) if path.name != DENSE and padding_pays(self.structure.rank, x) else None
        if both is None:
            return super().by_factors(x, bias, path)
        rows, columns = self.shape
        padded = both.numel() // (rows + columns)
        left, right = both[: padded * rows].view(padded, rows).T, both[padded * rows :].view(padded, columns)
        return onednn.linear(onednn.linear(x, right), left, bias)

    def _both_padded(self, x: Tensor) -> Tensor | None:
        """The cached factors with the rank padded; None where they may not be cached."""
        if not self.dispatcher.may_cache(self):
            return None
        return self._padded.get(self.factors(), autocast_dtype(x.device.type) or x.dtype, self._end_to_end)

    def _end_to_end(self) -> Tensor:
        """The factors, their rank padded to a multiple of `LANES`: left transposed, then right, row by row."""
        left, right = padded_rank(self.left, self.right)
        return torch.cat([left.T.flatten(), right.flatten()])

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.left) @ self.right

    def convolutions(self, kernel: tuple[int, ...], groups: int) -> list[Stage] | None:
        """The whole kernel to `rank` channels, then 1 x 1. Source: Denton et al. (2014)."""
        left, right = self.factors()
        inner, rest = divmod(self.shape[1], math.prod(kernel))
        if rest:
            return None
        first = Stage(right.reshape(-1, inner, *kernel), axes=tuple(range(len(kernel))), leading=groups)
        return [first, Stage(pointwise(left, len(kernel)), groups=groups)]


@dataclass(frozen=True, kw_only=True)
class LowRank(Decomposition):
    """Two thin factors of a given rank: the optimum in the Frobenius norm, and in a calibrated metric.

    With a metric the weight is whitened on both sides, truncated and un-whitened, which minimises
    tr(S (W - What) C (W - What)^T) exactly.

    Args:
        rank: columns of the left factor; left open, the budget chooses it.

    Sources: Eckart and Young (1936); input whitening, Wang et al., SVD-LLM (2024), section 3.1.
    """

    name: ClassVar[str] = "low_rank"
    rank: int | None = None

    def __post_init__(self) -> None:
        positive(self.name, "rank", self.rank)

    def candidates(self, shape: Shape) -> list[Self]:
        full = min(shape)
        if self.rank is None:
            return [type(self)(rank=r) for r in range(1, full + 1)]
        if self.rank > full:
            raise OptionError(
                f"low_rank: rank={self.rank} is above the full rank {full} of a {shape[0]}x{shape[1]} matrix"
            )
        return [self]

    def num_params(self, shape: Shape) -> int:
        return self._closed_rank(shape) * sum(shape)

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        if self.rank is not None:
            return super().complete(shape, max_params)
        rank = min(max_params // sum(shape), min(shape))
        return type(self)(rank=rank) if rank else None

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LowRankMatrix:
        return LowRankMatrix(self, shape, self._closed_rank(shape), device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> LowRankMatrix:
        shape = (weight.shape[0], weight.shape[1])
        matrix = self.empty(shape, device=weight.device, dtype=weight.dtype)
        left, right = truncated_in_metric(weight, self._closed_rank(shape), metric or Metric())
        assign(matrix.left, left)
        assign(matrix.right, right)
        return matrix

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        shape = (weight.shape[0], weight.shape[1])
        self.check(shape)
        squares = squared_singular_values(weight, metric or Metric())
        tails = squares.flip(0).cumsum(0).flip(0)  # summed from the smallest up: the last keep their digits
        errors = [*tails.tolist()[1:], 0.0]
        smaller = [(rank * sum(shape), replace(self, rank=rank)) for rank in range(1, len(errors) + 1)]
        pairs = [
            (choice, error)
            for choice, error in zip(smaller, errors, strict=True)
            if choice[0] < weight.numel() and self.rank in (None, choice[1].rank)
        ]
        return exact_curve([choice for choice, _ in pairs], [error for _, error in pairs])

    def _closed_rank(self, shape: Shape) -> int:
        self.check(shape)
        if self.rank is None:
            raise OptionError("low_rank: give a rank, or a budget that chooses it")
        return self.rank
