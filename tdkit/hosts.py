"""How each layer type holds its weight as an (out, in) matrix, and what takes its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.layers import FactorizedEmbedding, FactorizedLayer, FactorizedLinear


class Host(ABC):
    """One layer type. Exact types only: a subclass may have a forward of its own that a swap would lose."""

    name: ClassVar[str]

    @abstractmethod
    def accepts(self, module: nn.Module) -> bool:
        """Whether `module` is of exactly this layer type."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why an accepted module cannot be rewritten after all; None when it can."""
        return None

    def matrix(self, weight: Tensor) -> Tensor:
        """The layer's weight viewed as (out, in)."""
        return weight

    @abstractmethod
    def build(self, module: nn.Module, matrix: FactorizedMatrix, options: dict[str, Any]) -> FactorizedLayer:
        """The layer that takes the place of `module`, around `matrix`."""

    def options(self, module: nn.Module) -> dict[str, Any]:
        """What `build` must know of the dense weight, which is gone when a saved model is loaded."""
        return {}

    def multiplies(self) -> bool:
        """Whether the layer multiplies by its weight (a look-up of rows does not)."""
        return True


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


class EmbeddingHost(Host):
    """``torch.nn.Embedding``: one row of the matrix per entry."""

    name = "embedding"

    def accepts(self, module: nn.Module) -> bool:
        return type(module) is nn.Embedding

    def refusal(self, module: nn.Module) -> str | None:
        module = cast(nn.Embedding, module)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"nn.Embedding with {option}={getattr(module, option)} works on dense rows"
        return None

    def build(self, module: nn.Module, matrix: FactorizedMatrix, options: dict[str, Any]) -> FactorizedLayer:
        module = cast(nn.Embedding, module)
        return FactorizedEmbedding(matrix, module.padding_idx, **options)

    def options(self, module: nn.Module) -> dict[str, Any]:
        module = cast(nn.Embedding, module)
        if module.padding_idx is None:
            return {}
        return {} if bool(module.weight[module.padding_idx].any()) else {"zero_padding": True}

    def multiplies(self) -> bool:
        return False


HOSTS: tuple[Host, ...] = (LinearHost(), Conv1DHost(), EmbeddingHost())


def host_of(module: nn.Module) -> Host | None:
    """The host of a module's exact type, or None."""
    return next((host for host in HOSTS if host.accepts(module)), None)


def install(module: nn.Module, layer: FactorizedLayer) -> FactorizedLayer:
    """Give `layer` what must survive of the `module` it replaces: mode, hooks, gradient switch.

    The dictionaries of hooks are shared, so that the handles a user holds still remove them.
    """
    layer.training = module.training
    layer.matrix.train(module.training)
    for attribute in vars(module):
        if attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")):
            object.__setattr__(layer, attribute, getattr(module, attribute))
    layer.matrix.requires_grad_(bool(cast(Tensor, module.weight).requires_grad))
    return layer
