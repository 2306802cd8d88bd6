"""How each structure multiplies: the products of each path, and the pull-back of a gradient to the factors.

A structure holds integers only, so that it can be hashed, planned for and compiled; the factors are passed
to its methods. Every method is made of differentiable operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit import onednn
from tdkit.cost import DENSE, FEW, FUSED, Path, Product
from tdkit.kernels import FEW_TOKENS
from tdkit.shapes import Shape

Factors = Sequence[Tensor]
Gradients = tuple[Tensor | None, ...]

LANES = 16  # a CPU's library multiplies at a higher rate over an inner dimension that is a multiple of it
MANY = 256  # rows of x from which padding a rank to such a multiple pays
PADDED = 2**19  # numbers in the factors up to which it pays even anew for each call


def product(
    x: Tensor,  # (n, in)
    matrix: Tensor,  # (out, in), in memory by rows or by columns
    bias: Tensor | None = None,  # (out,)
) -> Tensor:  # (n, out)
    """``x @ matrix.T + bias``; two or three rows by the transposed product, which a CPU does 1 to 4 times faster."""
    if not _on_cpu(x) or not 1 < x.shape[0] <= FEW or matrix.stride(1) != 1:
        return onednn.linear(x, matrix, bias)
    y = (matrix @ x.T).T.contiguous()
    return y if bias is None else y + bias


def padded_rank(
    left: Tensor,  # (out, rank)
    right: Tensor,  # (rank, in)
) -> tuple[Tensor, Tensor]:
    """The same product with zeros that make the rank a multiple of `LANES`."""
    missing = (0, 0, 0, -right.shape[0] % LANES)
    return F.pad(left.T, missing).T, F.pad(right, missing)


def padding_pays(rank: int, x: Tensor) -> bool:
    """Whether x (*batch, in) is multiplied faster by factors whose rank is a multiple of `LANES`."""
    return rank % LANES != 0 and _on_cpu(x) and x.numel() >= MANY * x.shape[-1]


def _on_cpu(x: Tensor) -> bool:
    """Whether what is known of a CPU's library applies; a compiler has its own."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu"


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

    def kernel_paths(self, tokens: int) -> tuple[Path, ...]:
        """The way to multiply by a kernel of `tdkit.kernels`, where there is one for this many tokens; forward only."""
        return ()

    @abstractmethod
    def build_path(self) -> Path:
        """What `build` costs."""

    @abstractmethod
    def multiply(
        self,
        x: Tensor,  # (tokens, in)
        factors: Factors,
        path: Path,
        bias: Tensor | None = None,  # (out,)
    ) -> Tensor:  # (tokens, out)
        """``x @ build().T + bias`` by one of `factor_paths`."""

    @abstractmethod
    def factor_backward(
        self,
        gradient: Tensor,  # (tokens, out)
        x: Tensor,  # (tokens, in)
        factors: Factors,
        path: Path,
        needs_x: bool,
        needs_factors: Sequence[bool],
    ) -> tuple[Tensor | None, Gradients]:
        """The gradients of x and of the factors by one of `factor_paths`, without building the matrix."""

    def backward(
        self,
        gradient: Tensor,  # (tokens, out)
        x: Tensor,  # (tokens, in)
        factors: Factors,
        path: Path,
        needs_x: bool,
        needs_factors: Sequence[bool],
    ) -> tuple[Tensor | None, Gradients]:
        """The gradients of x and of the factors by one of `paths`; None for those that are not needed.

        The dense path goes through the gradient of the matrix.

        Source: Chekalina et al., TTM-GPT2 (2023), section 3.
        """
        if path.name != DENSE:
            return self.factor_backward(gradient, x, factors, path, needs_x, needs_factors)
        grad_x = gradient @ self.build(factors) if needs_x else None
        if not any(needs_factors):
            return grad_x, (None,) * len(factors)
        return grad_x, self.pullback(gradient.T @ x, factors)

    def paths(self, tokens: int) -> tuple[Path, ...]:
        """Every way to multiply `tokens` rows."""
        build, (rows, columns) = self.build_path(), self.shape
        dense = Product(tokens, columns, rows)
        back = (*3 * build.products, Product(tokens, rows, columns), Product(rows, tokens, columns))
        backward = Path("backward", back, 3 * build.calls + 2, 3 * build.moved)
        path = Path(DENSE, (*build.products, dense), build.calls + 1, build.moved, backward=backward)
        return (*self.factor_paths(tokens), path)

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
        (rows, columns), rank = self.shape, self.rank
        first, second = Product(tokens, columns, rank), Product(tokens, rank, rows)
        slopes = (Product(rows, tokens, rank), Product(rank, tokens, columns))
        backward = Path("backward", (first, second, first, *slopes), calls=5)
        return (Path("right, left", (first, second), calls=2, backward=backward),)

    def kernel_paths(self, tokens: int) -> tuple[Path, ...]:
        if tokens > FEW_TOKENS:
            return ()
        return (replace(self.factor_paths(tokens)[0], name=FUSED, backward=None),)

    def build_path(self) -> Path:
        return Path("build", (Product(self.shape[0], self.rank, self.shape[1]),))

    def multiply(self, x: Tensor, factors: Factors, path: Path, bias: Tensor | None = None) -> Tensor:
        left, right = factors
        if padding_pays(self.rank, x) and self.rank * sum(self.shape) <= PADDED:
            left, right = padded_rank(left, right)
        return product(product(x, right), left, bias)

    def factor_backward(
        self, gradient: Tensor, x: Tensor, factors: Factors, path: Path, needs_x: bool, needs_factors: Sequence[bool]
    ) -> tuple[Tensor | None, Gradients]:
        left, right = factors
        between = gradient @ left
        grad_left = gradient.T @ F.linear(x, right) if needs_factors[0] else None
        return between @ right if needs_x else None, (grad_left, between.T @ x if needs_factors[1] else None)
