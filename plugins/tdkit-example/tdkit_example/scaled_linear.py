"""A layer type of this package, y = scale * (x W) + bias, and the host that tells tdkit how it holds its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from tdkit import FactorizedMatrix
from tdkit.models.hosts import FactorizedLayer, Host, Observer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class ScaledLinear(nn.Module):
    """y = scale * (x W) + bias: a linear layer with a learned scale of every output.

    Args:
        width, out: sizes of x and y.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(width, out) / width**0.5)
        self.scale = nn.Parameter(torch.ones(out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(
        self,
        x: Tensor,  # (*batch, width)
    ) -> Tensor:  # (*batch, out)
        return self.scale * (x @ self.kernel) + self.bias


class FactorizedScaledLinear(FactorizedLayer):
    """The same with a factorised W."""

    host = "scaled_linear"
    replaces = "ScaledLinear"

    def __init__(self, matrix: FactorizedMatrix, scale: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.matrix = matrix  # (out, width)
        self.scale = scale
        self.bias = bias

    @property
    def matrices(self) -> dict[str, FactorizedMatrix]:
        return {"kernel": self.matrix}

    def forward(
        self,
        x: Tensor,  # (*batch, width)
    ) -> Tensor:  # (*batch, out)
        return self.scale * self.matrix.linear(x) + self.bias


class ScaledLinearHost(Host):
    """`ScaledLinear`: its weight is called ``kernel``, is (in, out), and what it multiplies is scaled afterwards."""

    name: ClassVar[str] = "scaled_linear"

    def accepts(self, module: nn.Module) -> bool:
        return type(module) is ScaledLinear

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        return ("kernel",)

    def canonical(self, stored: Tensor, weight: str) -> Tensor:
        return stored.T

    def stored(self, canonical: Tensor, weight: str) -> Tensor:
        return canonical.T.contiguous()

    def build(
        self, module: nn.Module, matrices: Mapping[str, FactorizedMatrix], options: Mapping[str, Any]
    ) -> FactorizedLayer:
        module = cast(ScaledLinear, module)
        return FactorizedScaledLinear(matrices["kernel"], module.scale, module.bias)

    def undo(self, layer: FactorizedLayer) -> nn.Module:
        layer = cast(FactorizedScaledLinear, layer)
        out, width = layer.matrix.shape
        dense = ScaledLinear(width, out)
        dense.kernel = nn.Parameter(self.stored(layer.matrix.dense().detach(), "kernel"))
        dense.scale, dense.bias = layer.scale, layer.bias
        return dense

    def attach(self, module: nn.Module, weight: str, observe: Observer) -> RemovableHandle:
        """The product is what comes before the scale, so the layer's output is computed again from it."""

        def hook(layer: nn.Module, args: tuple[Any, ...], _: Tensor) -> Tensor:
            (x,) = args
            if isinstance(layer, FactorizedScaledLinear):
                product = layer.matrix.linear(x)
            else:
                product = x @ cast(ScaledLinear, layer).kernel
            scale, bias = cast(Tensor, layer.scale), cast(Tensor, layer.bias)
            return scale * observe(x, product) + bias

        return module.register_forward_hook(hook)
