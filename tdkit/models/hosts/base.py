"""How each layer type holds its weight as an (out, in) matrix, and what takes its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.models.lazy_weight import lazy_weight


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


class FactorizedLayer(nn.Module, ABC):
    """A layer with a factorised `matrix`; `weight` is read-only and dense, built when its numbers are needed."""

    matrix: FactorizedMatrix

    @property
    @abstractmethod
    def replaces(self) -> str:
        """The type of the layer whose place this one takes, as rules name it."""

    def options(self) -> dict[str, Any]:
        """What its host needs to build it again, beyond the dense layer's own attributes; JSON-able."""
        return {}

    @property
    def weight(self) -> Tensor:
        """The dense weight in the layout of the layer that was replaced, computed when its numbers are needed."""
        return lazy_weight(self.matrix)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would answer a Parameter with "attribute already exists"
            raise AttributeError(
                f"the weight of a {type(self).__name__} is read-only, built from its factors: change the factors in "
                "`matrix`, or put a dense layer in its place"
            )
        super().__setattr__(name, value)
