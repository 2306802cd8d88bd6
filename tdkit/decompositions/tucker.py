"""W = core x_1 U x_2 V: a Tucker-2 decomposition over the two channel modes of a convolution's weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, FactorizedMatrix, Point, assign, factor
from tdkit.decompositions.error_curve import corrected_curve, exact_curve, lowest, spread
from tdkit.decompositions.options import positive
from tdkit.errors import OptionError
from tdkit.fitting.metric import Metric
from tdkit.fitting.tucker import HOOI_ENTRIES, TuckerErrors, fit_tucker
from tdkit.products.convolution import Stage, pointwise
from tdkit.shapes import Shape, by

Pair = tuple[int, int]  # (rank_out, rank_in)

REGISTER = 16  # float32 numbers of a vector register, by which convolutions on a CPU round channels up
INNER_RANKS = 16  # values of rank_in that an error curve compares
POINTS = 64  # of an error curve
FITS = 8  # of a curve whose closed form is not that of the fits


class TuckerMatrix(FactorizedMatrix):
    """Factors (out, rank_out) and (in, rank_in) of the channels and a core (rank_out, rank_in, *kernel)."""

    def __init__(
        self,
        decomposition: Decomposition,
        sizes: Shape,
        ranks: Pair,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(decomposition, sizes)
        self.out_factor = factor(sizes[0], ranks[0], device=device, dtype=dtype)
        self.core = factor(*ranks, *sizes[2:], device=device, dtype=dtype)
        self.in_factor = factor(sizes[1], ranks[1], device=device, dtype=dtype)

    def dense(self) -> Tensor:
        rows = torch.einsum("abt,ib->ait", self.core.flatten(2), self.in_factor)
        return self.out_factor @ rows.flatten(1)

    def multiply_adds(self) -> int:
        """Multiply-adds of the three convolutions for one position of each."""
        return self.params

    def convolutions(self, kernel: tuple[int, ...], groups: int) -> list[Stage] | None:
        """1 x 1 to rank_in, the kernel from rank_in to rank_out, and 1 x 1. Source: Kim et al. (2016), section 3.1."""
        if self.sizes[2:] != kernel:
            return None
        count = len(kernel)
        return [
            Stage(pointwise(self.in_factor.T, count), leading=groups),
            Stage(self.core, axes=tuple(range(count)), leading=groups),
            Stage(pointwise(self.out_factor, count), groups=groups),
        ]


@dataclass(frozen=True, kw_only=True)
class Tucker(Decomposition):
    """A core (rank_out, rank_in, *kernel) with a factor for the output and one for the input channels.

    As convolutions these are 1 x 1, the kernel on fewer channels, and 1 x 1.

    Args:
        rank_out: size of the core along the output channels; left open, the budget chooses it, about in proportion
            to the channels or, where the weight is known, as its error asks for.
        rank_in: size of the core along the input channels, likewise.

    Sources: Kim et al. (2016), "Compression of deep convolutional neural networks for fast and low power mobile
    applications"; De Lathauwer et al. (2000). The fit in a calibrated metric is ours (`tdkit.fitting.tucker`).
    """

    name: ClassVar[str] = "tucker"
    orders: ClassVar[frozenset[int]] = frozenset({3, 4, 5})
    rank_out: int | None = None
    rank_in: int | None = None

    def __post_init__(self) -> None:
        positive(self.name, "rank_out", self.rank_out)
        positive(self.name, "rank_in", self.rank_in)

    def candidates(self, shape: Shape) -> list[Self]:
        """Both ranks given: this one. One given: every value of the other. None given: ranks in proportion, rank_out a
        multiple of 16 from 32 on."""
        pairs = self._pairs(shape)
        smaller = [pair for pair in pairs if _params(shape, pair) < math.prod(shape)]
        if not smaller or smaller[-1] != pairs[-1]:
            smaller.append(pairs[-1])  # the largest is exact
        return [replace(self, rank_out=rank_out, rank_in=rank_in) for rank_out, rank_in in smaller]

    def num_params(self, shape: Shape) -> int:
        return _params(shape, self._closed(shape))

    def best_within(self, weight: Tensor, metric: Metric | None, max_params: int) -> Decomposition | None:
        """The pair of ranks with the least error among those of `curve`'s closed form within `max_params`."""
        shape = tuple(weight.shape)
        if weight.is_meta:
            return self.complete(shape, max_params)
        points = [point for point in self._frontier(shape, self._errors(weight, metric)) if point.params <= max_params]
        return points[-1].decomposition if points else self.complete(shape, max_params)

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TuckerMatrix:
        return TuckerMatrix(self, shape, self._closed(shape), device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> TuckerMatrix:
        shape = tuple(weight.shape)
        rank_out, rank_in = self._closed(shape)
        matrix = self.empty(shape, device=weight.device, dtype=weight.dtype)
        found = fit_tucker(weight.flatten(2), metric or Metric(), rank_in, rank_out)
        out = torch.eye(shape[0], dtype=found.core.dtype, device=weight.device) if found.out is None else found.out
        level = float(found.core.abs().max()) ** (1 / 3) or 1.0  # one scale for all entries, also in half precision
        assign(matrix.out_factor, out * level)
        assign(matrix.core, (found.core / level**2).reshape(matrix.core.shape))
        assign(matrix.in_factor, found.inner * level)
        return matrix

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        """See `Decomposition.curve`.

        One factorisation gives the errors of a closed form for all pairs of ranks, of which the best are taken. In a
        metric they are lowered as those of a few pairs fall in a few steps, where these do not take long; without one
        only a few are returned as fitted, or for large weights, whose fits are the closed form, all.
        """
        errors = self._errors(weight, metric)
        points = spread(self._frontier(tuple(weight.shape), errors), POINTS)
        if metric is None and weight.numel() > HOOI_ENTRIES:
            return points
        if metric is not None:

            def refined(kind: Decomposition) -> float | None:
                assert isinstance(kind, Tucker)
                return errors.refined(kind.rank_in or 1, kind.rank_out)

            return corrected_curve(points, refined)
        kinds = [(point.params, point.decomposition) for point in spread(points, FITS)]
        return exact_curve(kinds, [kind.squared_error(weight) for _, kind in kinds])

    def _errors(self, weight: Tensor, metric: Metric | None) -> TuckerErrors:
        return TuckerErrors.of(weight.flatten(2), metric or Metric(), self._bounds(tuple(weight.shape))[1][1])

    def _frontier(self, shape: Shape, errors: TuckerErrors) -> list[Point]:
        """The pairs of ranks below the dense size that no smaller pair beats, with the error of the closed form."""
        least, most = self._bounds(shape)
        inner = range(least[1], most[1] + 1)
        picked = spread(list(inner), INNER_RANKS)
        points = []
        for rank_in, found in zip(picked, errors.bounds(picked), strict=True):
            values = found.tolist()
            low, high = max(least[0], -(-rank_in // math.prod(shape[2:]))), min(most[0], len(values))
            for rank_out in range(low, high + 1):
                pair = (rank_out, rank_in)
                kind = replace(self, rank_out=rank_out, rank_in=rank_in)
                points.append(Point(kind, _params(shape, pair), values[rank_out - 1]))
        return lowest([point for point in points if point.params < math.prod(shape)])

    def _bounds(self, shape: Shape) -> tuple[Pair, Pair]:
        """The least and the largest (rank_out, rank_in) for a weight of `shape`.

        Raises:
            OptionError: when the shape is not that of a tensor, or a rank that is given cannot be met by it.
        """
        out, inner, *kernel = self.shape_of(shape)
        size = math.prod(kernel)
        full = min(out, inner * size), min(inner, out * size)
        for option, given, bound in (("rank_out", self.rank_out, full[0]), ("rank_in", self.rank_in, full[1])):
            if given is not None and given > bound:
                raise OptionError(f"tucker: {option}={given} is above the full rank {bound} of a {by(shape)} weight")
        if self.rank_out is not None and self.rank_in is not None:
            for larger, smaller, option in (
                (self.rank_out, self.rank_in, "rank_out"),
                (self.rank_in, self.rank_out, "rank_in"),
            ):
                if larger > smaller * size:
                    raise OptionError(
                        f"tucker: {option}={larger} is above the full rank {smaller * size} of a core with "
                        f"{smaller} x {by(tuple(kernel))} other entries"
                    )
        least = self.rank_out or 1, self.rank_in or 1
        return (
            (max(least[0], -(-least[1] // size)), max(least[1], -(-least[0] // size))),
            (
                min(self.rank_out or full[0], (self.rank_in or full[1]) * size),
                min(self.rank_in or full[1], (self.rank_out or full[0]) * size),
            ),
        )

    def _pairs(self, shape: Shape) -> list[Pair]:
        least, most = self._bounds(shape)
        steps = max(high - low for low, high in zip(least, most, strict=True))
        size = math.prod(shape[2:])
        pairs = {least: None}
        for step in range(1, steps + 1):
            rank_out, rank_in = (low + (high - low) * step // steps for low, high in zip(least, most, strict=True))
            rank_out, rank_in = min(rank_out, rank_in * size), min(rank_in, rank_out * size)
            pairs[max(rank_out, least[0]), max(rank_in, least[1])] = None
        if self.rank_out is not None or self.rank_in is not None or size == 1:
            return list(pairs)
        return sorted({_aligned(shape, pair): None for pair in pairs}, key=lambda pair: _params(shape, pair))

    def _closed(self, shape: Shape) -> Pair:
        self._bounds(shape)
        if self.rank_out is None or self.rank_in is None:
            raise OptionError(f"{self.describe()}: give rank_out and rank_in, or a budget that chooses them")
        return self.rank_out, self.rank_in


def _aligned(shape: Shape, pair: Pair) -> Pair:
    """The pair with about as many parameters whose rank_out fills whole registers, from two of them on.

    The convolution with the kernel, which takes most of the time, has rank_out channels: for 64 to 64 channels at half
    the multiply-adds (32, 44) takes 0.63 of the dense time, (38, 38) 0.77 (``tests/benchmarks/speed.py``).
    """
    out, inner, size = shape[0], shape[1], math.prod(shape[2:])
    rank_out = round(pair[0] / REGISTER) * REGISTER
    if rank_out < 2 * REGISTER or rank_out > out or pair[0] == out:
        return pair
    rank_in = (_params(shape, pair) - out * rank_out) // (rank_out * size + inner)
    return (rank_out, rank_in) if -(-rank_out // size) <= rank_in <= min(inner, rank_out * size) else pair


def _params(shape: Shape, pair: Pair) -> int:
    rank_out, rank_in = pair
    return shape[0] * rank_out + rank_out * rank_in * math.prod(shape[2:]) + rank_in * shape[1]
