"""How each structure multiplies: the products of each path, and the pull-back of a gradient to the factors.

A structure holds integers only, so that it can be hashed, planned for and compiled; the factors are passed
to its methods. Every method is made of differentiable operations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.cost import DENSE, Path, Product, chunk_of
from tdkit.linalg import rearrange, restore
from tdkit.shapes import Shape

Factors = Sequence[Tensor]
Gradients = tuple[Tensor | None, ...]

WIDE = 16  # columns below which a batch of small products is slower than moving the axes to make one large one


@dataclass(frozen=True)
class Structure(ABC):
    """The shapes of one factorised matrix (out, in)."""

    shape: Shape

    @abstractmethod
    def build(self, factors: Factors) -> Tensor:
        """The matrix, (out, in)."""

    @abstractmethod
    def pullback(self, gradient: Tensor, factors: Factors) -> Gradients:
        """Gradients of the factors from the gradient (out, in) of the matrix; the factors' products are shared."""

    @abstractmethod
    def factor_paths(self, tokens: int) -> tuple[Path, ...]:
        """The ways to multiply without building the matrix."""

    @abstractmethod
    def build_path(self) -> Path:
        """What `build` costs."""

    @abstractmethod
    def multiply(
        self,
        x: Tensor,  # (tokens, in)
        factors: Factors,
        path: Path,
    ) -> Tensor:  # (tokens, out)
        """``x @ build().T`` by one of `factor_paths`."""

    @abstractmethod
    def multiply_transposed(
        self,
        y: Tensor,  # (tokens, out)
        factors: Factors,
        path: Path,
    ) -> Tensor:  # (tokens, in)
        """``y @ build()`` without building the matrix."""

    def multiply_pullback(self, gradient: Tensor, x: Tensor, factors: Factors, path: Path) -> Gradients:
        """Gradients of the factors from that of the product (tokens, out): through the matrix's own gradient.

        Source: Chekalina et al., TTM-GPT2 (2023), section 3.
        """
        return self.pullback(gradient.T @ x, factors)

    def paths(self, tokens: int) -> tuple[Path, ...]:
        """Every way to multiply `tokens` rows."""
        build = self.build_path()
        dense = Product(tokens, self.shape[1], self.shape[0])
        return (*self.factor_paths(tokens), Path(DENSE, (*build.products, dense), build.calls + 1, build.moved))

    def multiply_adds(self) -> int:
        """Multiply-adds of the path that needs fewest, for one row."""
        return min(path.multiply_adds for path in self.paths(1))


@dataclass(frozen=True)
class LowRankStructure(Structure):
    """left (out, rank) times right (rank, in)."""

    rank: int

    def build(self, factors: Factors) -> Tensor:
        left, right = factors
        return left @ right

    def pullback(self, gradient: Tensor, factors: Factors) -> Gradients:
        left, right = factors
        return gradient @ right.T, left.T @ gradient

    def factor_paths(self, tokens: int) -> tuple[Path, ...]:
        rows, columns = self.shape
        return (Path("right, left", (Product(tokens, columns, self.rank), Product(tokens, self.rank, rows)), calls=2),)

    def build_path(self) -> Path:
        return Path("build", (Product(self.shape[0], self.rank, self.shape[1]),))

    def multiply(self, x: Tensor, factors: Factors, path: Path) -> Tensor:
        left, right = factors
        return F.linear(F.linear(x, right), left)

    def multiply_transposed(self, y: Tensor, factors: Factors, path: Path) -> Tensor:
        left, right = factors
        return (y @ left) @ right

    def multiply_pullback(self, gradient: Tensor, x: Tensor, factors: Factors, path: Path) -> Gradients:
        left, right = factors
        return gradient.T @ F.linear(x, right), (gradient @ left).T @ x


@dataclass(frozen=True)
class KroneckerStructure(Structure):
    """sum_r A[r] kron B[r], with A (terms, a1, a2) and B (terms, b1, b2).

    With x as blocks (tokens, a2, b2), the path 'B, A' contracts b2 with B and then (a2, term) with A;
    'A, B' contracts a2 with A and then (term, b2) with B. The order that needs fewer multiply-adds fixes
    `a_axes` and `b_axes`, the storage order of the factors in which both steps are plain products.
    """

    terms: int
    a: Shape
    b: Shape

    @property
    def b_first(self) -> bool:
        terms, (a1, a2), (b1, b2) = self.terms, self.a, self.b
        return terms * a2 * b1 * (b2 + a1) <= terms * a1 * b2 * (a2 + b1)

    @property
    def a_axes(self) -> tuple[int, int, int]:
        """The order of A's axes (term, row, column) in memory."""
        return (1, 2, 0) if self.b_first else (1, 0, 2)

    @property
    def b_axes(self) -> tuple[int, int, int]:
        """The order of B's axes (term, row, column) in memory."""
        return (0, 1, 2) if self.b_first else (1, 0, 2)

    def build(self, factors: Factors) -> Tensor:
        a, b = factors
        return restore(_columns(a).T @ b.flatten(1), self.a, self.b)

    def pullback(self, gradient: Tensor, factors: Factors) -> Gradients:
        a, b = factors
        rearranged = rearrange(gradient, self.a, self.b)  # (a1 a2, b1 b2)
        return (rearranged @ b.flatten(1).T).T.reshape(a.shape), (a.flatten(1) @ rearranged).reshape(b.shape)

    def factor_paths(self, tokens: int) -> tuple[Path, ...]:
        terms, (a1, a2), (b1, b2) = self.terms, self.a, self.b
        if self.b_first:
            first = Product(tokens * a2, b2, terms * b1)
            second, moved = _broadcast(a1, a2 * terms, b1, tokens)
            return (Path("B, A", (first, second), calls=5, moved=moved),)
        first, moved = _broadcast(a1 * terms, a2, b2, tokens)
        return (Path("A, B", (first, Product(tokens * a1, terms * b2, b1)), calls=5, moved=moved),)

    def build_path(self) -> Path:
        product = Product(math.prod(self.a), self.terms, math.prod(self.b))
        return Path("build", (product,), calls=4, moved=math.prod(self.shape))

    def multiply(self, x: Tensor, factors: Factors, path: Path) -> Tensor:
        a, b = factors
        return self._chunked(lambda part: _kron(part, a, b, self.b_first), x, self.shape[0])

    def multiply_transposed(self, y: Tensor, factors: Factors, path: Path) -> Tensor:
        a, b = factors[0].mT, factors[1].mT
        return self._chunked(lambda part: _kron(part, a, b, not self.b_first), y, self.shape[1])

    def multiply_pullback(self, gradient: Tensor, x: Tensor, factors: Factors, path: Path) -> Gradients:
        """Both gradients chunk by chunk from x and the factors, or through the matrix's own when that is less work."""
        own = 3 * sum(product.multiply_adds for product in self.factor_paths(1)[0].products)
        if own >= math.prod(self.shape):
            return super().multiply_pullback(gradient, x, factors, path)
        a, b = factors
        size = chunk_of(x.shape[0], 2 * self._between * x.element_size(), x.device.type)
        parts = [
            _kron_pullback(gradient[start : start + size], x[start : start + size], a, b, self.b_first)
            for start in range(0, x.shape[0], size)
        ]
        if not parts:
            return torch.zeros_like(a), torch.zeros_like(b)
        return torch.stack([part[0] for part in parts]).sum(0), torch.stack([part[1] for part in parts]).sum(0)

    @property
    def _between(self) -> int:
        """Numbers per token that lie between the two products."""
        return self.terms * (self.a[1] * self.b[0] if self.b_first else self.a[0] * self.b[1])

    def _chunked(self, step: Callable[[Tensor], Tensor], x: Tensor, columns: int) -> Tensor:
        size = chunk_of(x.shape[0], self._between * x.element_size(), x.device.type)
        if size >= x.shape[0]:
            return step(x)
        starts = range(0, x.shape[0], size)
        if torch.is_grad_enabled():
            return torch.cat([step(x[start : start + size]) for start in starts])
        out = x.new_empty(x.shape[0], columns)
        for start in starts:
            out[start : start + size] = step(x[start : start + size])
        return out


def _columns(factor: Tensor) -> Tensor:
    """(terms, rows * columns), a view where the storage order allows it."""
    return factor.permute(1, 2, 0).flatten(0, 1).T


def _broadcast(rows: int, inner: int, columns: int, tokens: int) -> tuple[Product, int]:
    """The product of one matrix (rows, inner) with a batch (tokens, inner, columns), and what it moves."""
    if columns >= WIDE:
        return Product(rows, inner, columns, batch=tokens), 0
    return Product(tokens * columns, inner, rows), tokens * columns * (inner + rows)


def _times_batch(
    matrix: Tensor,  # (rows, inner)
    batch: Tensor,  # (tokens, inner, columns)
) -> Tensor:  # (tokens, rows, columns)
    if batch.shape[2] >= WIDE:
        return torch.matmul(matrix, batch)
    return F.linear(batch.transpose(1, 2), matrix).transpose(1, 2)


def _kron(x: Tensor, a: Tensor, b: Tensor, b_first: bool) -> Tensor:
    (terms, a1, a2), (_, b1, b2) = a.shape, b.shape
    tokens = x.shape[0]
    if b_first:
        between = (x.reshape(tokens * a2, b2) @ b.flatten(0, 1).T).reshape(tokens, a2 * terms, b1)
        out = _times_batch(a.permute(1, 2, 0).reshape(a1, a2 * terms), between)
    else:
        between = _times_batch(a.permute(1, 0, 2).reshape(a1 * terms, a2), x.reshape(tokens, a2, b2))
        out = between.reshape(tokens * a1, terms * b2) @ b.permute(1, 0, 2).reshape(b1, terms * b2).T
    return out.reshape(tokens, a1 * b1)


def _kron_pullback(gradient: Tensor, x: Tensor, a: Tensor, b: Tensor, b_first: bool) -> tuple[Tensor, Tensor]:
    (terms, a1, a2), (_, b1, b2) = a.shape, b.shape
    tokens = x.shape[0]
    out = gradient.reshape(tokens, a1, b1)
    blocks = x.reshape(tokens, a2, b2)
    if b_first:
        between = (blocks.reshape(-1, b2) @ b.flatten(0, 1).T).reshape(tokens, a2 * terms, b1)
        grad_a = out.transpose(0, 1).reshape(a1, -1) @ between.transpose(0, 1).reshape(a2 * terms, -1).T
        grad_between = _times_batch(a.permute(1, 2, 0).reshape(a1, a2 * terms).T, out)
        grad_b = grad_between.reshape(tokens * a2, terms * b1).T @ blocks.reshape(-1, b2)
        return grad_a.reshape(a1, a2, terms).permute(2, 0, 1), grad_b.reshape(terms, b1, b2)
    between = _times_batch(a.permute(1, 0, 2).reshape(a1 * terms, a2), blocks).reshape(tokens * a1, terms * b2)
    grad_b = out.reshape(tokens * a1, b1).T @ between
    grad_between = (out.reshape(-1, b1) @ b.permute(1, 0, 2).reshape(b1, terms * b2)).reshape(tokens, a1 * terms, b2)
    grad_a = grad_between.transpose(0, 1).reshape(a1 * terms, -1) @ blocks.transpose(0, 1).reshape(a2, -1).T
    return grad_a.reshape(a1, terms, a2).transpose(0, 1), grad_b.reshape(b1, terms, b2).transpose(0, 1)
