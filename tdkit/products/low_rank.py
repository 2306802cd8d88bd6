"""The product of a low-rank pair: two matrix products, with the rank padded where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from tdkit.products.cost import FUSED, Path, Product
from tdkit.products.kernels import FEW_TOKENS
from tdkit.products.structure import Factors, Gradients, Structure, _on_cpu, product

# Measured with ``python tests/benchmarks/speed.py --parts eval`` (its column "bare" has the rank padded in advance).
LANES = 16  # an inner dimension that is a multiple of it is multiplied faster on a CPU
MANY = 256  # rows of x from which it is faster to pad the rank to such a multiple
PADDED = 2**19  # elements of the factors up to which it is faster to pad them again in every call


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
