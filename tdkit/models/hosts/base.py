"""What a host must say about its layer type, and what a factorised layer must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.models.lazy_weight import lazy_weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of the weights that can be fitted

Observer = Callable[[Tensor, Tensor], Tensor]
"""``(x, y) -> y``: sees what enters and what leaves a product with a weight; what it returns takes the place of y."""


class FactorizedLayer(nn.Module, ABC):
    """A layer with a factorised `matrix`; `weight` is read-only and dense, built when its numbers are needed.

    A layer with several factorised weights overrides `matrices`.
    """

    matrix: FactorizedMatrix

    @property
    @abstractmethod
    def host(self) -> str:
        """The registered name of the host that built it."""

    @property
    @abstractmethod
    def replaces(self) -> str:
        """The type of the layer whose place this one takes, as rules name it."""

    @property
    def matrices(self) -> dict[str, FactorizedMatrix]:
        """The factorised weights by the names that the dense layer holds them under."""
        return {"weight": self.matrix}

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


class Host(ABC):
    """All that tdkit knows about one layer type.

    A subclass sets `name`, writes `accepts`, `build` and `undo`, and is registered under that name through the
    entry-point group ``tdkit.hosts``. The defaults are those of a layer that holds one weight (out, in) as
    ``weight`` and returns ``x @ weight.T``. `tdkit.testing.host_checks` is the contract.

    Accept exact types only: a subclass may have a forward of its own, which the new layer would not run.
    """

    name: ClassVar[str]

    @abstractmethod
    def accepts(self, module: nn.Module) -> bool:
        """Whether `module` is of exactly this layer type."""

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the parameters of `module` that can be factorised, one by one."""
        return ("weight",)

    def refusal(self, module: nn.Module, weight: str) -> str | None:
        """Why a weight of an accepted module cannot be factorised after all; None when it can."""
        return None

    def matrix(
        self,
        tensor: Tensor,  # a weight as the layer holds it
        weight: str,
    ) -> Tensor:  # (out, in)
        """The weight called `weight` viewed as a matrix."""
        return tensor

    def tensor(
        self,
        matrix: Tensor,  # (out, in)
        weight: str,
    ) -> Tensor:
        """The reverse of `matrix`: the weight as the layer holds it."""
        return matrix

    @abstractmethod
    def build(
        self, module: nn.Module, matrices: Mapping[str, FactorizedMatrix], options: Mapping[str, Any]
    ) -> FactorizedLayer:
        """The layer that takes the place of `module`.

        Args:
            module: the dense layer; biases and weights that are not factorised stay the same parameters.
            matrices: the factorised weights, all of `weights` or some of them.
            options: what `options` said of the dense layer.
        """

    @abstractmethod
    def undo(self, layer: FactorizedLayer) -> nn.Module:
        """The dense layer that stands for a factorised one: the reverse of `build`.

        Its biases are the same parameters, its weights new ones, in the layout, dtype and device of the factors.
        """

    def options(self, module: nn.Module) -> dict[str, Any]:
        """What `build` must know of the dense weights, which are gone when a saved model is loaded; JSON-able."""
        return {}

    def multiplications(self, module: nn.Module, weight: str) -> int:
        """How often a call multiplies one row of its input by the weight; 0 for a look-up of rows."""
        return 1

    def attach(self, module: nn.Module, weight: str, observe: Observer) -> RemovableHandle:
        """Call ``observe(x, y)`` whenever `module` multiplies by a weight, and go on with what it returns.

        x is (\\*batch, in) with one row per product, y (\\*batch, out), so that the gradient of y has the rows that
        belong to those of x. For a look-up x is (\\*n,) integer ids, and y (\\*n, in). A layer that reads its weight
        otherwise, such as a convolution, gives both in this form.

        Returns:
            A handle whose ``remove()`` ends it.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            return observe(args[0] if args else next(iter(kwargs.values())), y)

        return module.register_forward_hook(hook, with_kwargs=True)


def unsupported(tensor: Tensor) -> str | None:
    """Why a parameter of any layer cannot be factorised, by its tensor type and dtype; None when it can."""
    if is_lazy(tensor):
        return "its shape is not known before the model has run once"
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = type(tensor)
        return f"it is a {kind.__module__}.{kind.__qualname__}, not a plain tensor: its storage is of another form"
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"its dtype is {str(tensor.dtype).removeprefix('torch.')}, and fits are for {known}"
    return None


def install(module: nn.Module, layer: FactorizedLayer) -> FactorizedLayer:
    """Give `layer` what must survive of the `module` it replaces: mode, hooks, `requires_grad`.

    The dictionaries of hooks are shared, so that the handles a user holds still remove them.
    """
    transfer(module, layer)
    for name, matrix in layer.matrices.items():
        matrix.train(module.training)
        matrix.requires_grad_(bool(cast(Tensor, getattr(module, name)).requires_grad))
    return layer


def transfer(module: nn.Module, other: nn.Module) -> None:
    """Give `other` the mode and the hooks of `module`."""
    other.training = module.training
    for attribute in vars(module):
        if attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")):
            object.__setattr__(other, attribute, getattr(module, attribute))
