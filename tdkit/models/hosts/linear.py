"""``nn.Linear`` and transformers' ``Conv1D``, and the factorised layer that replaces them."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.models.hosts.base import FactorizedLayer, Host
from tdkit.models.lazy_weight import lazy_weight


class LinearHost(Host):
    """``torch.nn.Linear``: weight (out, in)."""

    name = "linear"

    def accepts(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear

    def build(self, module: nn.Module, matrix: FactorizedMatrix, options: dict[str, Any]) -> FactorizedLayer:
        return FactorizedLinear(matrix, cast("nn.Parameter | None", module.bias))


class Conv1DHost(Host):
    """transformers' ``Conv1D``: weight (in, out). Recognised by name, so that transformers is not imported."""

    name = "conv1d"

    def accepts(self, module: nn.Module) -> bool:
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def build(self, module: nn.Module, matrix: FactorizedMatrix, options: dict[str, Any]) -> FactorizedLayer:
        return FactorizedLinear(matrix, cast("nn.Parameter | None", module.bias), transposed=True)


class FactorizedLinear(FactorizedLayer):
    """y = x W^T + bias with a factorised W, in place of ``nn.Linear`` or transformers' ``Conv1D``.

    Args:
        matrix: of shape (out_features, in_features).
        bias: (out_features,) or None.
        transposed: whether `weight` is read as (in, out), as in ``Conv1D``.
    """

    def __init__(self, matrix: FactorizedMatrix, bias: nn.Parameter | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_parameter("bias", bias)
        self.transposed = transposed
        self.out_features, self.in_features = matrix.shape
        if transposed:
            self.nf, self.nx = matrix.shape

    @property
    def replaces(self) -> str:
        return "Conv1D" if self.transposed else "Linear"

    @property
    def weight(self) -> Tensor:
        """The dense weight: (out, in), or (in, out) when `transposed`."""
        return lazy_weight(self.matrix, (self.nx, self.nf), Tensor.t) if self.transposed else lazy_weight(self.matrix)

    def forward(
        self,
        x: Tensor,  # (*batch, in_features)
    ) -> Tensor:  # (*batch, out_features)
        return self.matrix.linear(x, cast("Tensor | None", self.bias))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
