"""``nn.Linear`` and transformers' ``Conv1D``, and the factorised layers that replace them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.models.hosts.base import FactorizedLayer, FactorizedModule, Host
from tdkit.models.hosts.sequential import PlainStages
from tdkit.models.lazy_weight import lazy_weight
from tdkit.support.compatibility import submodules_of


class FactorizedLinear(FactorizedLayer):
    """Computes x W^T + bias with a factorised W; replaces ``nn.Linear``.

    Args:
        matrix: of shape (out_features, in_features).
        bias: (out_features,) or None.
    """

    def __init__(self, matrix: FactorizedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = matrix.shape

    @property
    def host(self) -> str:
        return "linear"

    @property
    def replaces(self) -> str:
        return "Linear"

    def forward(
        self,
        input: Tensor,  # noqa: A002, the name that nn.Linear gives it; (*batch, in_features)
    ) -> Tensor:  # (*batch, out_features)
        y: Tensor = submodules_of(self)["matrix"](input, self.bias)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FactorizedConv1D(FactorizedLinear):
    """Like `FactorizedLinear`; replaces transformers' ``Conv1D``, whose weight is (in, out)."""

    def __init__(self, matrix: FactorizedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__(matrix, bias)
        self.nf, self.nx = matrix.shape

    @property
    def host(self) -> str:
        return "conv1d"

    @property
    def replaces(self) -> str:
        return "Conv1D"

    @property
    def weight(self) -> Tensor:
        """The dense weight, (in, out)."""
        return lazy_weight(self.matrix, (self.nx, self.nf), Tensor.t)

    def forward(
        self,
        x: Tensor,  # (*batch, nx)
    ) -> Tensor:  # (*batch, nf)
        y: Tensor = submodules_of(self)["matrix"](x, self.bias)
        return y


class LinearHost(Host):
    """Host of ``torch.nn.Linear``: weight (out, in)."""

    name = "linear"
    layer = nn.Linear
    factorized = FactorizedLinear
    resizes = True

    def accepts(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear

    def build(
        self, module: nn.Module, matrices: Mapping[str, FactorizedMatrix], options: Mapping[str, Any]
    ) -> FactorizedLayer:
        return FactorizedLinear(matrices["weight"], cast("nn.Parameter | None", module.bias))

    def resized(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        return _with_tensors(dense, weight, bias)

    def undo(self, layer: FactorizedModule) -> nn.Module:
        layer = cast(FactorizedLinear, layer)
        return self.resized(layer, layer.matrix.dense(), cast("nn.Parameter | None", layer.bias))

    def sequential(self, layer: FactorizedModule, stages: PlainStages) -> nn.Sequential | None:
        return _pair(layer, stages)


class Conv1DHost(Host):
    """Host of transformers' ``Conv1D``: weight (in, out). Compared by name, so that transformers is not imported."""

    name = "conv1d"
    resizes = True

    def accepts(self, module: nn.Module) -> bool:
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"

    def canonical(self, stored: Tensor, weight: str) -> Tensor:
        return stored.T

    def stored(self, canonical: Tensor, weight: str) -> Tensor:
        return canonical.T.contiguous()

    def build(
        self, module: nn.Module, matrices: Mapping[str, FactorizedMatrix], options: Mapping[str, Any]
    ) -> FactorizedLayer:
        return FactorizedConv1D(matrices["weight"], cast("nn.Parameter | None", module.bias))

    def resized(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
        from transformers.pytorch_utils import Conv1D  # the layer came from a model of this library

        with torch.device("meta"):
            dense = Conv1D(*weight.shape)
        return _with_tensors(dense, self.stored(weight, "weight"), bias)

    def undo(self, layer: FactorizedModule) -> nn.Module:
        layer = cast(FactorizedConv1D, layer)
        return self.resized(layer, layer.matrix.dense(), cast("nn.Parameter | None", layer.bias))

    def sequential(self, layer: FactorizedModule, stages: PlainStages) -> nn.Sequential | None:
        return _pair(layer, stages)


def _with_tensors(dense: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Gives a layer a copy of a weight in its layout, and a bias: itself if it is a parameter, else as a new one."""
    dense.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    known = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    dense.register_parameter("bias", known)
    return dense


def _pair(layer: FactorizedModule, stages: PlainStages) -> nn.Sequential | None:
    layer = cast(FactorizedLinear, layer)
    found = stages(layer.matrix)
    if found is None:
        return None
    chain = nn.Sequential()
    for stage in found:
        out, width = stage.weight.shape
        plain = nn.Linear(width, out, bias=False, device="meta")
        plain.weight = cast(nn.Parameter, stage.weight)
        chain.append(plain)
    chain[-1].register_parameter("bias", cast("nn.Parameter | None", layer.bias))
    return chain
