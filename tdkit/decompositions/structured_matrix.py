"""A factorised matrix whose structure says how to multiply; that of every shipped decomposition is one."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from tdkit.decompositions.base import Decomposition, FactorizedMatrix
from tdkit.products import kernels
from tdkit.products.autograd import linear
from tdkit.products.cost import FUSED, Path
from tdkit.products.structure import Structure


class StructuredMatrix(FactorizedMatrix):
    """Factors of one `structure`; each product takes the path that is cheapest for its tokens, dtype and device."""

    structure: Structure

    def __init__(self, decomposition: Decomposition, structure: Structure) -> None:
        super().__init__(decomposition, structure.shape)
        self.structure = structure

    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """The factors in the order in which the structure takes them."""

    def dense(self) -> Tensor:
        return self.structure.build(self.factors())

    def matmul(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def multiply_adds(self) -> int:
        return self.structure.multiply_adds()

    def paths(self, tokens: int) -> tuple[Path, ...]:
        return self.structure.paths(tokens)

    def multiply(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor:
        if path.name == FUSED and kernels.accept(x, bias, *self.factors()):
            return self.fused(x.reshape(-1, self.shape[1]), bias).reshape(*x.shape[:-1], self.shape[0])
        return self.by_factors(x, bias, path)

    def by_factors(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor:
        """``x @ dense().T + bias`` by operations of torch, also for a path whose kernel cannot take this x."""
        return linear(x, bias, self.factors(), self.structure, path)

    def fused(
        self,
        x: Tensor,  # (tokens, in)
        bias: Tensor | None,  # (out,)
    ) -> Tensor:  # (tokens, out)
        """The same by a Triton kernel, for a structure that has such a path."""
        raise NotImplementedError

    def tensors(self) -> tuple[Tensor, ...]:
        return self.factors()
