"""The base classes of hosts, which describe a layer type, and of factorised layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import TdkitError
from tdkit.models.hosts.routing import StackObserver
from tdkit.models.hosts.sequential import PlainStages
from tdkit.models.lazy_weight import lazy_weight
from tdkit.models.preparation import drop_caches
from tdkit.support.compatibility import parameters_of, rebind_hooked_forward

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes of weights that can be fitted

DENSE_SHAPE = "dense_shape"  # attribute of a dense layer that is smaller than it was: the shape (out, in) that it had

Observer = Callable[[Tensor, Tensor], Tensor]
"""``(x, y) -> y``: called with the input and output of a product with a weight; its result replaces y."""


class Removable(Protocol):
    """A handle of hooks."""

    def remove(self) -> None: ...


class Handles:
    """Several handles as one."""

    def __init__(self, *handles: Removable) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class ObservedParameter:
    """A parameter that requires gradients, which are handed to `observe` and not kept, until `remove` is called."""

    def __init__(self, parameter: nn.Parameter, observe: Callable[[Tensor], None]) -> None:
        self.parameter = parameter
        self._before = parameter.grad, parameter.requires_grad
        parameter.grad = None
        parameter.requires_grad_(True)

        def seen(_: Tensor) -> None:
            if parameter.grad is not None:
                observe(parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad)
            parameter.grad = None

        self._handle = parameter.register_post_accumulate_grad_hook(seen)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        self._handle.remove()
        grad, trained = self._before
        self.parameter.requires_grad_(trained)
        self.parameter.grad = grad


class FactorizedModule(nn.Module, ABC):
    """A module with weights that are held as factors."""

    @property
    @abstractmethod
    def host(self) -> str:
        """The registered name of the host that built this layer."""

    @property
    def builder(self) -> Host | None:
        """The host that built this layer, where it is not the one registered as `host`."""
        return None

    @property
    @abstractmethod
    def replaces(self) -> str:
        """The type of the dense layer that this one replaces, as used in rules."""

    @property
    @abstractmethod
    def matrices(self) -> dict[str, FactorizedMatrix]:
        """The factorised matrices (out, in), by the names of the weights in the dense layer."""

    def options(self) -> dict[str, Any]:
        """Returns JSON-serialisable options that the host needs, besides the dense layer, to build this layer again."""
        return {}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for weight in self.matrices:  # saved models mark it by a single number: see `markers` of checkpoints
            if getattr(state_dict.get(prefix + weight), "shape", None) == (1,):
                del state_dict[prefix + weight]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setattr__(self, name: str, value: Any) -> None:
        found = getattr(type(self), name, None)
        if isinstance(found, property) and found.fset is None:  # for a Parameter nn.Module would say "already exists"
            raise AttributeError(
                f"the {name} of a {type(self).__name__} is read-only, built from its factors: change the factors in "
                "`matrices`, or put a dense layer in its place"
            )
        super().__setattr__(name, value)


class FactorizedLayer(FactorizedModule):
    """A layer with a factorised `matrix`; its dense `weight` is read-only and computed on first use.

    Layers with several factorised weights override `matrices`.
    """

    matrix: FactorizedMatrix

    @property
    def matrices(self) -> dict[str, FactorizedMatrix]:
        return {"weight": self.matrix}

    @property
    def weight(self) -> Tensor:
        """The dense weight in the layout of the replaced layer; computed on first use."""
        return lazy_weight(self.matrix)


class Host(ABC):
    """Describes one layer type: its weights, how they are read as matrices, and the factorised layer.

    A subclass sets `name`, implements `accepts`, `build` and `undo`, and is registered under that name in the
    entry-point group ``tdkit.hosts``. The other methods default to a layer with one weight (out, in) called
    ``weight`` that returns ``x @ weight.T``. `tdkit.testing.host_checks` tests a host.

    Attributes:
        name: the registered name.
        layer: the layer type, where its subclasses shall be factorised as well: see `InPlaceHost`.
        factorized: the factorised layer, if `layer` is set. A subclass of it and of `layer` calls its ``forward``
            without its ``__init__`` having run: it may use attributes of the dense layer, its `matrix`, and those
            that `adopt` sets.
        in_place: whether the module becomes the layer that `build` returns, instead of being replaced by it.
        resizes: whether it has a `resized`.

    `accepts` must not accept subclasses: they may override ``forward``, which the factorised layer would not call.
    """

    name: ClassVar[str]
    layer: ClassVar[type[nn.Module] | None] = None
    factorized: ClassVar[type[FactorizedLayer] | None] = None
    in_place: ClassVar[bool] = False
    resizes: ClassVar[bool] = False

    @abstractmethod
    def accepts(self, module: nn.Module) -> bool:
        """Returns whether `module` is of exactly this layer type."""

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        """Returns the names of the parameters of `module` that can be factorised, independently of each other."""
        return ("weight",)

    def refusal(self, module: nn.Module, weight: str) -> str | None:
        """Returns why a weight of an accepted module cannot be factorised, or None when it can."""
        return None

    def canonical(
        self,
        stored: Tensor,  # the weight in the layout of the layer
        weight: str,
    ) -> Tensor:  # (out, in) or (out, in, *kernel)
        """Returns the weight called `weight` in the layout of decompositions, which must be a view."""
        return stored

    def stored(
        self,
        canonical: Tensor,  # (out, in) or (out, in, *kernel)
        weight: str,
    ) -> Tensor:
        """Returns a weight (out, in, *kernel) in the layout of the layer: the inverse of `canonical`."""
        return canonical

    @abstractmethod
    def build(
        self, module: nn.Module, matrices: Mapping[str, FactorizedMatrix], options: Mapping[str, Any]
    ) -> FactorizedModule:
        """Returns the factorised layer that replaces `module`.

        Args:
            module: the dense layer; its biases and the weights that are not factorised are reused, not copied.
            matrices: the factorised matrices (out, in) by weight name, for all of `weights` or some of them.
            options: what `options` returned for the dense layer.
        """

    @abstractmethod
    def undo(self, layer: FactorizedModule) -> nn.Module:
        """Returns the dense layer with the outputs of a factorised one: the inverse of `build`.

        Biases are reused, not copied. Weights are new parameters in the dense layout, with the dtype and device of
        the factors.
        """

    def sequential(self, layer: FactorizedModule, stages: PlainStages) -> nn.Sequential | None:
        """Returns plain layers of torch that one after the other have the outputs of a factorised one, or None.

        Args:
            layer: a layer that `build` returned.
            stages: gives the weights of such layers for a matrix.
        """
        return None

    def resized(
        self,
        module: nn.Module,
        weight: Tensor,  # (out, in)
        bias: Tensor | None,  # (out,)
    ) -> nn.Module:
        """Returns a dense layer of the same type with other tensors, of other sizes as a rule; copies neither.

        Raises:
            TdkitError: when layers of this type cannot have other sizes, which is the default.
        """
        raise TdkitError(f"host '{self.name}' of {type(module).__name__} does not make layers of other sizes")

    def options(self, module: nn.Module) -> dict[str, Any]:
        """Returns JSON-serialisable facts about the dense weights for `build`; they are stored in a saved model."""
        return {}

    def adopt(self, layer: nn.Module, options: Mapping[str, Any]) -> None:
        """Set the attributes that `factorized` has in addition to those of `layer`, on a layer of a subclass."""
        return

    def computed(self, module: nn.Module, weight: str) -> str:
        """Returns how the factorised layer computes: "by factors", or "dense" if it builds the dense weight."""
        return "by factors"

    def params(self, module: nn.Module, weight: str) -> int:
        """Returns the number of parameters of the module that vanish when the weight is factorised."""
        return int(getattr(module, weight).numel())

    def multiplications(self, module: nn.Module, weight: str) -> int:
        """Returns the number of products with the weight per row of the layer's input; 0 for a look-up of rows."""
        return 1

    def stacked(self, module: nn.Module, weight: str) -> bool:
        """Returns whether a weight is a stack of matrices (members, out, in), each multiplied by rows of its own."""
        return False

    def attach_stack(self, module: nn.Module, weight: str, observe: StackObserver) -> Removable:
        """Like `attach`, for a weight that is `stacked`: ``observe(routing, x, y)`` also gets the member of each row.

        Raises:
            TdkitError: when the host has no such weights.
        """
        raise TdkitError(f"{weight} of a {type(module).__name__} is no stack of matrices for its host '{self.name}'")

    def multiply_adds(self, module: nn.Module, weight: str, matrix: FactorizedMatrix) -> int:
        """Returns the multiply-adds of one product with the factorised weight."""
        return matrix.multiply_adds()

    def path(self, module: nn.Module, weight: str, matrix: FactorizedMatrix, tokens: int) -> str:
        """Returns the name of the fastest path for `tokens` products, estimated for float32 on this machine's CPU."""
        return min(matrix.paths(tokens), key=lambda path: path.seconds()).name

    def attach(self, module: nn.Module, weight: str, observe: Observer) -> Removable:
        """Call ``observe(x, y)`` at each product of `module` with a weight, and replace y by the result.

        x is (\\*batch, in) and y (\\*batch, out), with one row per product, so that the rows of the gradient of y
        correspond to the rows of x. Where each group of outputs multiplies rows of its own, as in a grouped
        convolution, x is (\\*batch, groups, in / groups) and y (\\*batch, out). For a look-up x is (\\*n,) integer ids
        and y is (\\*n, in). A layer that applies its weight in another way, such as a convolution, must reshape x and
        y to one of these forms.

        Returns:
            A handle whose ``remove()`` removes the observer.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            return observe(args[0] if args else next(iter(kwargs.values())), y)

        return module.register_forward_hook(hook, with_kwargs=True)

    def attach_gradient(self, module: nn.Module, weight: str, observe: Callable[[Tensor], None]) -> Removable:
        """Call ``observe(gradient)`` with the gradient of a weight, in the layout of the layer, in each backward pass.

        For weights whose products are not seen by `attach`. The ``grad`` of the parameter stays as it is.

        Returns:
            A handle whose ``remove()`` removes the observer.
        """
        parameter = parameters_of(module).get(weight)
        return Handles() if parameter is None else ObservedParameter(parameter, observe)

    def __deepcopy__(self, memo: Any) -> Host:
        return self


def unsupported(tensor: Tensor) -> str | None:
    """Returns why a parameter of this tensor type and dtype cannot be factorised, or None when it can."""
    if is_lazy(tensor):
        return "its shape is not known before the model has run once"
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = type(tensor)
        return f"it is a {kind.__module__}.{kind.__qualname__}, not a plain tensor: its storage is of another form"
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"its dtype is {str(tensor.dtype).removeprefix('torch.')}, and fits are for {known}"
    return None


def install(module: nn.Module, layer: FactorizedModule) -> FactorizedModule:
    """Copy mode, hooks and `requires_grad` from `module` to the `layer` that replaces it; returns `layer`.

    The dictionaries of hooks are shared, so that existing handles still remove their hooks.
    """
    transfer(module, layer)
    for name, matrix in layer.matrices.items():
        matrix.train(module.training)
        with torch.inference_mode(False), torch.enable_grad():  # a parametrized weight is computed here
            trained = bool(cast(Tensor, getattr(module, name)).requires_grad)
        matrix.requires_grad_(trained)
    return layer


def install_resized(module: nn.Module, host: Host, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Returns a dense layer like `module` with other tensors (see `Host.resized`), with its mode and hooks.

    The layer remembers in ``dense_shape`` the shape (out, in) of the weight of the first layer that it comes from, by
    which a saved model says which of its layers are smaller than their config has them.
    """
    dense = host.resized(module, weight, bias)
    transfer(module, dense)
    for name, parameter in dense.named_parameters(recurse=False):
        parameter.requires_grad_(bool(getattr(module, name).requires_grad))
    shape = tuple(host.canonical(parameters_of(module)["weight"], "weight").shape)
    vars(dense)[DENSE_SHAPE] = vars(module).get(DENSE_SHAPE, shape)
    return dense


def become(module: nn.Module, other: nn.Module) -> None:
    """Give `module` the class and the state of `other`, which must not be used afterwards."""
    state = dict(vars(other))
    module.__class__ = type(other)
    vars(module).clear()
    vars(module).update(state)
    rebind_hooked_forward(module)
    drop_caches(module)


def transfer(module: nn.Module, other: nn.Module) -> None:
    """Copy the training mode of `module` to `other` and share its hooks."""
    other.training = module.training
    for attribute in vars(module):
        if attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")):
            object.__setattr__(other, attribute, getattr(module, attribute))
