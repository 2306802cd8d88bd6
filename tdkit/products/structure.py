"""How each structure multiplies: the products of each path, and the pullback of a gradient to the factors.

A structure holds integers only, so that it can be hashed, planned for and compiled; the factors are passed
to its methods. Every method is made of differentiable operations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tdkit.products import onednn
from tdkit.products.cost import DENSE, FEW, Path, Product
from tdkit.products.recording import is_recorded
from tdkit.shapes import Shape

Factors = Sequence[Tensor]

Gradients = tuple[Tensor | None, ...]


def product(
    x: Tensor,  # (n, in)
    matrix: Tensor,  # (out, in), in memory by rows or by columns
    bias: Tensor | None = None,  # (out,)
) -> Tensor:  # (n, out)
    """``x @ matrix.T + bias``; two or three rows by the transposed product, which is 1 to 4 times faster on a CPU."""
    if not _on_cpu(x) or not 1 < x.shape[0] <= FEW or matrix.stride(1) != 1:
        return onednn.linear(x, matrix, bias)
    y = (matrix @ x.T).T.contiguous()
    return y if bias is None else y + bias


def _on_cpu(x: Tensor) -> bool:
    """Whether x is multiplied by the library whose speed on a CPU is known; a recorded program uses another one."""
    return not is_recorded() and x.device.type == "cpu"


@dataclass(frozen=True)
class Structure(ABC):
    """The shapes of one factorised matrix (out, in)."""

    shape: Shape

    @property
    def fields(self) -> tuple[Any, ...]:
        """The integers that it is made of, which torch.compile can compare and pass on, unlike the structure."""
        return tuple([getattr(self, name) for name in self.__match_args__])

    @abstractmethod
    def build(self, factors: Factors) -> Tensor:
        """The matrix, (out, in)."""

    @abstractmethod
    def pullback(self, gradient: Tensor, factors: Factors) -> Gradients:
        """Gradients of the factors from the gradient (out, in) of the matrix."""

    @abstractmethod
    def factor_paths(self, tokens: int) -> tuple[Path, ...]:
        """The paths that do not build the matrix, by operations of torch."""

    def kernel_paths(self, tokens: int) -> tuple[Path, ...]:
        """The path of a kernel of `tdkit.products.kernels`, where one serves this many tokens; forward only."""
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
        """Every path to multiply `tokens` rows without a cached weight."""
        return (*self.factor_paths(tokens), *self.kernel_paths(tokens), self.dense_path(tokens))

    def recorded_path(self) -> Path:
        """The path in a program for all numbers of tokens: that with the fewest multiply-adds in each call.

        The dense path counts without what it takes to build the matrix: a runtime computes what is constant once.
        """
        paths = *self.factor_paths(1), self.dense_path(1)
        return min(paths, key=lambda path: math.prod(self.shape) if path.name == DENSE else path.multiply_adds)

    def dense_path(self, tokens: int) -> Path:
        """The path that builds the matrix."""
        build, (rows, columns) = self.build_path(), self.shape
        dense = Product(tokens, columns, rows)
        back = (*3 * build.products, Product(tokens, rows, columns), Product(rows, tokens, columns))
        backward = Path("backward", back, 3 * build.calls + 2, 3 * build.moved)
        return Path(DENSE, (*build.products, dense), build.calls + 1, build.moved, backward=backward)

    def multiply_adds(self) -> int:
        """Multiply-adds of the path that needs fewest, for one row."""
        return min(path.multiply_adds for path in (*self.factor_paths(1), self.dense_path(1)))
