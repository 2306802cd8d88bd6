"""W = sum_r A_r kron B_r: the nearest sum of Kronecker products, by rearrangement and truncated SVD."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Point, assign, factor
from tdkit.decompositions.error_curve import exact_curve, sampled_curve
from tdkit.decompositions.options import pair, positive
from tdkit.decompositions.structured_matrix import StructuredMatrix
from tdkit.errors import OptionError
from tdkit.fitting.linalg import nearest_kronecker, rearrange, singular_values, working
from tdkit.fitting.metric import Metric
from tdkit.fitting.train_in_metric import kronecker_in_metric, train_errors
from tdkit.products.convolution import Stage, pointwise
from tdkit.products.train import KroneckerStructure
from tdkit.shapes import Shape, divisors
from tdkit.support.compatibility import parameters_of


class KroneckerMatrix(StructuredMatrix):
    """A (terms, a1, a2) and B (terms, b1, b2), standing for sum_r A[r] kron B[r]."""

    structure: KroneckerStructure

    def __init__(
        self,
        decomposition: Decomposition,
        shape: Shape,
        terms: int,
        a: Shape,
        b: Shape,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        structure = KroneckerStructure(shape, terms, a, b)
        super().__init__(decomposition, structure)
        self.a = factor(terms, *a, axes=structure.a_axes, device=device, dtype=dtype)
        self.b = factor(terms, *b, axes=structure.b_axes, device=device, dtype=dtype)

    def factors(self) -> tuple[Tensor, ...]:
        parameters = parameters_of(self)
        try:
            return parameters["a"], parameters["b"]
        except KeyError:  # one has a parametrization
            return self.a, self.b

    def fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        from tdkit.products.kernels.kronecker import kronecker_product  # imports Triton

        (a, b), (source, target) = self.factors(), self.orders()
        return kronecker_product(x, a, b, bias, source=source, target=target)

    def orders(self) -> tuple[Tensor | None, Tensor | None]:
        """Where in x the columns of the Kronecker sum find their entries and where in y its rows go; None: in order."""
        return None, None

    def rows(self, ids: Tensor) -> Tensor:
        b1 = self.structure.b[0]
        flat = ids.reshape(-1)
        upper = self.a[:, flat // b1]  # (terms, n, a2)
        lower = self.b[:, flat % b1]  # (terms, n, b2)
        rows = upper.permute(1, 2, 0) @ lower.permute(1, 0, 2)  # (n, a2, b2)
        return rows.reshape(*ids.shape, self.shape[1])

    def convolutions(self, kernel: tuple[int, ...], groups: int) -> list[Stage] | None:
        """B on the inner channels and the kernel, then A on the outer channels; None where B holds part of a kernel.

        Source: Hameed et al. (2022), "Convolutional neural network compression through generalized Kronecker product
        decomposition", section 3.
        """
        a, b = self.factors()
        terms, (rows, outer), (b_rows, b_columns) = self.structure.terms, self.structure.a, self.structure.b
        inner, rest = divmod(b_columns, math.prod(kernel))
        if rest or rows % groups:
            return None
        first = b.reshape(terms * b_rows, inner, *kernel)  # channels (outer, inner) to (outer, term, row of B)
        second = a.permute(1, 2, 0).reshape(rows, outer * terms)
        return [
            Stage(first, axes=tuple(range(len(kernel))), leading=groups * outer),
            Stage(pointwise(second, len(kernel)), groups=groups, trailing=b_rows),
        ]


@cache
def splits(shape: Shape) -> tuple[tuple[Shape, Shape], ...]:
    """Every pair of factor shapes (a, b) of `shape`, without 1x1 factors and, where others exist, without
    the two that make the sum of Kronecker products a plain low-rank product."""
    rows, columns = shape
    every = [((a1, a2), (rows // a1, columns // a2)) for a1 in divisors(rows) for a2 in divisors(columns)]
    proper = [(a, b) for a, b in every if math.prod(a) > 1 and math.prod(b) > 1] or every
    outer = {((rows, 1), (1, columns)), ((1, columns), (rows, 1))}
    return tuple(s for s in proper if s not in outer) or tuple(proper)


@dataclass(frozen=True, kw_only=True)
class Kronecker(Decomposition):
    """A sum of Kronecker products, optimal in the Frobenius norm for its factor shapes.

    Args:
        terms: number of products; left open, the budget chooses it.
        a: (rows, columns) of the factors A, which divide those of the matrix. Where `b` is given it follows. With both
            open, the shapes nearest to a low-rank product are chosen among those that use the whole budget (they fit
            trained weights best, in the calibrated metric by far), then those with the fewest parameters per term.
        b: (rows, columns) of the factors B, those of the matrix divided by those of A. Where `a` is given it follows.

    Sources: Van Loan and Pitsianis (1993); Tahaei et al., KroneckerBERT (2021); Edalati et al., KnGPT2
    (2021).
    """

    name: ClassVar[str] = "kronecker"
    terms: int | None = None
    a: Shape | None = None
    b: Shape | None = None

    def __post_init__(self) -> None:
        positive(self.name, "terms", self.terms)
        object.__setattr__(self, "a", pair(self.name, "a", self.a))
        object.__setattr__(self, "b", pair(self.name, "b", self.b))

    def is_complete(self) -> bool:
        return self.terms is not None

    def candidates(self, shape: Shape) -> list[Self]:
        return [
            replace(self, terms=terms, a=a, b=b)
            for terms, a, b in sorted(
                ((terms, a, b) for a, b in self._shapes(shape) for terms in self._terms(shape, a, b)),
                key=lambda c: (c[0] * (math.prod(c[1]) + math.prod(c[2])), c),
            )
        ]

    def num_params(self, shape: Shape) -> int:
        terms, a, b = self._closed(shape)
        return terms * (math.prod(a) + math.prod(b))

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        choices: list[tuple[tuple[float, ...], Self]] = []
        for a, b in self._shapes(shape):
            size = math.prod(a) + math.prod(b)
            fitting = [t for t in self._terms(shape, a, b) if t * size <= max_params]
            if fitting:
                unspent = round(1 - fitting[-1] * size / max_params, 1)  # in tenths: counts before the shape
                choice = replace(self, terms=fitting[-1], a=a, b=b)
                choices.append(((unspent, *_shape_cost(a, b)), choice))
        return min(choices, key=lambda c: c[0])[1] if choices else None

    def check(self, shape: Shape) -> None:
        if not any(len(self._terms(shape, a, b)) for a, b in self._shapes(shape)):
            raise OptionError(
                f"{self.name}: terms={self.terms} is above the full Kronecker rank of every split of a "
                f"{shape[0]}x{shape[1]} matrix"
            )

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KroneckerMatrix:
        terms, a, b = self._closed(shape)
        return KroneckerMatrix(self, shape, terms, a, b, device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> KroneckerMatrix:
        shape = (weight.shape[0], weight.shape[1])
        matrix = self.empty(shape, device=weight.device, dtype=weight.dtype)
        terms, a, b = self._closed(shape)
        if metric is None:
            factor_a, factor_b = nearest_kronecker(weight, a, b, terms)
        else:
            factor_a, factor_b = kronecker_in_metric(weight, metric, a, b, terms)
        assign(matrix.a, factor_a)
        assign(matrix.b, factor_b)
        return matrix

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        """See `Decomposition.curve`; for the one pair of factor shapes that suits about half the dense size.

        Without a metric the spectrum of the rearranged matrix gives every point exactly. In the metric a few
        points are fitted with few steps, so that `fit` does no worse, and the others lie between them.
        """
        shape = (weight.shape[0], weight.shape[1])
        self.check(shape)
        half = replace(self, terms=None).complete(shape, weight.numel() // 2) or self.candidates(shape)[0]
        if self.terms is not None:
            half = self
        _, a, b = half._closed(shape)
        size = math.prod(a) + math.prod(b)
        smaller: list[tuple[int, Decomposition]] = [
            (terms * size, replace(self, terms=terms, a=a, b=b))
            for terms in self._terms(shape, a, b)
            if terms * size < weight.numel()
        ]
        if metric is None:
            squares = singular_values(rearrange(working(weight), a, b)).square()
            tails = [*squares.flip(0).cumsum(0).flip(0).tolist(), 0.0]
            return exact_curve(smaller, [tails[params // size] for params, _ in smaller])

        def errors(params: list[int]) -> list[float]:
            ranks = [(1, count // size, 1) for count in params]
            return train_errors(weight, metric, ranks, (a[0], b[0]), (a[1], b[1]))

        return sampled_curve(smaller, weight.numel(), errors)

    def _shapes(self, shape: Shape) -> tuple[tuple[Shape, Shape], ...]:
        if self.a is None and self.b is None:
            return splits(shape)
        given, option = (self.a, "a") if self.a is not None else (self.b, "b")
        assert given is not None
        if shape[0] % given[0] or shape[1] % given[1]:
            raise OptionError(
                f"{self.name}: {option}={given[0]}x{given[1]} does not divide a {shape[0]}x{shape[1]} matrix"
            )
        other = (shape[0] // given[0], shape[1] // given[1])
        a, b = (given, other) if option == "a" else (other, given)
        if self.b is not None and self.b != b:
            raise OptionError(
                f"{self.name}: a={a[0]}x{a[1]} and b={self.b[0]}x{self.b[1]} do not multiply to a "
                f"{shape[0]}x{shape[1]} matrix; with this a, b must be {b[0]}x{b[1]}"
            )
        return ((a, b),)

    def _terms(self, shape: Shape, a: Shape, b: Shape) -> range:
        full = min(math.prod(a), math.prod(b))
        if self.terms is None:
            return range(1, full + 1)
        if self.terms > full:
            if self.a is None and self.b is None:
                return range(0)
            raise OptionError(
                f"{self.name}: terms={self.terms} is above the full Kronecker rank {full} of a "
                f"{shape[0]}x{shape[1]} matrix with a={a[0]}x{a[1]}, b={b[0]}x{b[1]}"
            )
        return range(self.terms, self.terms + 1)

    def _closed(self, shape: Shape) -> tuple[int, Shape, Shape]:
        self.check(shape)
        if self.terms is None:
            raise OptionError(f"{self.describe()}: give terms, or a budget that chooses them")
        possible = [(a, b) for a, b in self._shapes(shape) if len(self._terms(shape, a, b))]
        return self.terms, *min(possible, key=lambda s: _shape_cost(*s))


def _shape_cost(a: Shape, b: Shape) -> tuple[float, ...]:
    """Least for the preferred shapes: distance from low rank, params per term, multiply-adds.

    Among equal ones B is a vector if one of the factors is, so that no axis is permuted between the products.
    """
    distance = min(a[0] * b[1], a[1] * b[0])  # 1 where A is a column and B a row, or the reverse
    multiply_adds = min(a[1] * b[0] * (b[1] + a[0]), a[0] * b[1] * (a[1] + b[0]))
    return distance, math.prod(a) + math.prod(b), multiply_adds, min(b), -a[1]
