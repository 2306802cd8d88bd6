"""Any module: its parameters held as factors, by a subclass of its class that the module takes in place."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.models.hosts.base import FactorizedModule, Handles, Host, Observer, Removable
from tdkit.models.hosts.products import observing
from tdkit.models.hosts.windows import observed
from tdkit.models.lazy_weight import keep_in_cache
from tdkit.products.recording import is_recorded
from tdkit.shapes import Shape
from tdkit.support.compatibility import (
    RecurrentWeights,
    parameters_of,
    pre_hooks_of,
    recurrent_weights_again,
    shallow_copy,
    submodules_of,
    without_recurrent_weights,
)

_T = TypeVar("_T")
MATRIX = "matrix"  # the submodule with the matrix, in the layers of a base host
GRADIENT_OBSERVERS = "_gradient_observers"  # the attribute with the observers of weights, by their names


class InPlaceHost(Host):
    """Host of every parameter of two or more dimensions, of any module.

    The factorised layer takes the place of the module by becoming it: the module keeps its identity and attributes
    and gets another class, a subclass of its own, that computes a dense parameter when it is read, once per call of
    ``forward``. A module that is an instance of a layer type with a host, such as a scaled embedding, also inherits
    from the factorised layer of that host, whose ``forward`` multiplies by the factors, where its own ``forward`` is
    inherited or calls ``super().forward``.

    Args:
        base: the host of the layer type that the module is an instance of; None when there is none.
    """

    name = "in_place"
    in_place = True

    def __init__(self, base: Host | None = None) -> None:
        self.base = base

    def accepts(self, module: nn.Module) -> bool:
        return not isinstance(module, FactorizedModule | FactorizedMatrix)

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        own = [name for name, parameter in parameters_of(module).items() if parameter is not None]
        return tuple(name for name in (*own, *parametrized(module)) if getattr(module, name).ndim >= 2)

    def refusal(self, module: nn.Module, weight: str) -> str | None:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            return f"{type(module).__name__} with sparse=True works on dense rows: its gradients are sparse"
        if any(isinstance(hook, SpectralNorm) and weight == f"{hook.name}_orig" for hook in pre_hooks_of(module)):
            return "the hook of nn.utils.spectral_norm needs it: use nn.utils.parametrizations.spectral_norm instead"
        return None

    def canonical(self, stored: Tensor, weight: str) -> Tensor:
        base = self._base_of(weight)
        return base.canonical(stored, weight) if base else stored.reshape(balanced(tuple(stored.shape)))

    def stored(self, canonical: Tensor, weight: str) -> Tensor:
        base = self._base_of(weight)
        return base.stored(canonical, weight) if base else canonical

    def computed(self, module: nn.Module, weight: str) -> str:
        base = self._base_of(weight)
        if base is None or base.layer is None or isinstance(module, NonDynamicallyQuantizableLinear):
            return "dense"  # nn.MultiheadAttention reads the weight of its output projection
        forward = getattr(inspect.unwrap(dense_type(module).forward), "__code__", None)
        calls_super = forward is not None and "__class__" in forward.co_freevars
        inherited = dense_type(module).forward is base.layer.forward
        return base.computed(module, weight) if inherited or calls_super else "dense"

    def build(
        self, module: nn.Module, matrices: Mapping[str, FactorizedMatrix], options: Mapping[str, Any]
    ) -> FactorizedModule:
        layer = shallow_copy(module)
        state = vars(layer)
        state["_shapes"] = {weight: self._shapes(getattr(module, weight), weight) for weight in matrices}
        state["_order"] = tuple(parameters_of(module))
        state["_built"] = None
        _without_parametrizations(layer, matrices)
        without_recurrent_weights(layer)
        for weight in matrices:
            parameters_of(layer).pop(weight, None)
        base = self.base if self.base is not None and "weight" in matrices else None
        layer.__class__ = in_place_class(self.layer_class(), type(layer), base, tuple(matrices))
        for weight, matrix in matrices.items():
            submodules_of(layer)[cast(InPlaceLayer, layer).matrix_name(weight)] = matrix
        if base is not None:
            base.adopt(layer, options)
        return cast(InPlaceLayer, layer)

    def undo(self, layer: FactorizedModule) -> nn.Module:
        layer = cast(InPlaceLayer, layer)
        dense: nn.Module = shallow_copy(layer)
        state, parameters = vars(dense), parameters_of(dense)
        for weight in layer.weight_names:
            parameters[weight] = nn.Parameter(layer.dense_weight(weight).detach().clone())
            del submodules_of(dense)[layer.matrix_name(weight)]
        order = [name for name in state["_order"] if name in parameters]
        dense._parameters = {name: parameters[name] for name in (*order, *parameters)}
        for attribute in ("_shapes", "_order", "_built", GRADIENT_OBSERVERS):
            state.pop(attribute, None)
        dense.__class__ = layer.dense_class
        recurrent_weights_again(dense)
        return dense

    def options(self, module: nn.Module) -> dict[str, Any]:
        return {} if self.base is None else self.base.options(module)

    def params(self, module: nn.Module, weight: str) -> int:
        if weight in parametrized(module):
            held = submodules_of(cast(nn.Module, module.parametrizations))[weight]
            return sum(parameter.numel() for parameter in held.parameters())
        return super().params(module, weight)

    def multiplications(self, module: nn.Module, weight: str) -> int:
        base = self._base_of(weight)
        return base.multiplications(module, weight) if base else 1

    def multiply_adds(self, module: nn.Module, weight: str, matrix: FactorizedMatrix) -> int:
        base = self._base_of(weight)
        return base.multiply_adds(module, weight, matrix) if base else super().multiply_adds(module, weight, matrix)

    def path(self, module: nn.Module, weight: str, matrix: FactorizedMatrix, tokens: int) -> str:
        base = self._base_of(weight)
        return base.path(module, weight, matrix, tokens) if base else super().path(module, weight, matrix, tokens)

    def attach(self, module: nn.Module, weight: str, observe: Observer) -> Removable:
        base = self._base_of(weight)
        if base is not None and base.layer is not None and dense_type(module).forward is base.layer.forward:
            return base.attach(module, weight, observe)
        if isinstance(module, InPlaceLayer):
            if base is None:
                return Handles()
            matrix = submodules_of(module)[module.matrix_name(weight)]
            running: list[nn.Module] = []  # a tied matrix is called by other layers too

            def see(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
                if not running:
                    return None
                geometry = args[2] if len(args) > 2 else None  # of a convolution
                return observe(args[0], y) if geometry is None else observed(observe, args[0], y, geometry)

            return Handles(
                module.register_forward_pre_hook(lambda called, _: running.append(called)),
                matrix.register_forward_hook(see),
                module.register_forward_hook(lambda *_: running.clear(), always_call=True),
            )
        return observing(module, weight, observe, looks_up=self.multiplications(module, weight) == 0)

    def attach_gradient(self, module: nn.Module, weight: str, observe: Callable[[Tensor], None]) -> Removable:
        if isinstance(module, InPlaceLayer):
            return module.observed(weight, observe)
        if weight not in parametrized(module):
            return super().attach_gradient(module, weight, observe)

        def see(_: nn.Module, __: Any, effective: Tensor) -> Tensor:
            return _with_gradient_seen(effective, observe)

        held = submodules_of(cast(nn.Module, module.parametrizations))[weight]
        return held.register_forward_hook(see)

    def layer_class(self) -> type[InPlaceLayer]:
        """Returns the class that factorised layers inherit from first."""
        return InPlaceLayer

    def _shapes(self, stored: Tensor, weight: str) -> tuple[Shape, Shape]:
        """Returns the canonical and the stored shape of a weight."""
        return tuple(self.canonical(stored, weight).shape), tuple(stored.shape)

    def _base_of(self, weight: str) -> Host | None:
        return self.base if weight == "weight" else None


class InPlaceLayer(FactorizedModule):
    """A module with some parameters held as factors; its class is made by `in_place_class`.

    Attributes:
        own_class: this class, or the subclass of it that the class is made of.
        dense_class: the class of the dense module.
        base: the host whose factorised layer it inherits from; None when there is none.
        weight_names: the parameters that are held as factors.
        matrix_names: the names of the submodules with their factors.
    """

    own_class: ClassVar[type[InPlaceLayer]]
    dense_class: ClassVar[type[nn.Module]]
    base: ClassVar[Host | None]
    weight_names: ClassVar[tuple[str, ...]]
    matrix_names: ClassVar[Mapping[str, str]]

    @property
    def host(self) -> str:
        return InPlaceHost.name

    @property
    def builder(self) -> Host:
        return InPlaceHost(self.base)

    @property
    def replaces(self) -> str:
        return self.dense_class.__name__

    @property
    def matrices(self) -> dict[str, FactorizedMatrix]:
        held = submodules_of(self)
        return {name: cast(FactorizedMatrix, held[self.matrix_name(name)]) for name in self.weight_names}

    def matrix_name(self, weight: str) -> str:
        """Returns the name of the submodule with the factors of a parameter."""
        return self.matrix_names[weight]

    def dense_weight(self, weight: str) -> Tensor:
        """Returns a parameter, computed from its factors: once per call of ``forward``, or cached in eval mode.

        See `tdkit.prepare` for what may be cached.
        """
        return self.once_per_call(weight, functools.partial(self._built_weight, weight))

    def once_per_call(self, key: str, compute: Callable[[], _T]) -> _T:
        """Returns ``compute()``, computed once per call of ``forward`` and mode of gradients; each time outside."""
        built: dict[object, Any] | None = vars(self)["_built"]
        if built is None:
            return compute()
        mode = key, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if mode not in built:
            built[mode] = compute()
        return cast(_T, built[mode])

    def weight_in_cache(self, name: str) -> Tensor | None:
        """Returns a parameter within a call of ``forward`` where it is cached, in fewer steps than `dense_weight`."""
        state, held = self.__dict__, self.matrix_names.get(name)
        if held is None or state["_built"] is None or state.get(GRADIENT_OBSERVERS):
            return None
        matrix = cast(FactorizedMatrix, state["_modules"][held])
        return matrix.dispatcher.stored_again(matrix)

    def _built_weight(self, weight: str) -> Tensor:
        matrix = cast(FactorizedMatrix, submodules_of(self)[self.matrix_name(weight)])
        dense = matrix.dispatcher.stored(matrix, functools.partial(self._as_stored, weight))
        for observe in vars(self).get(GRADIENT_OBSERVERS, {}).get(weight, ()):
            dense = _with_gradient_seen(dense, observe)
        return dense

    def _as_stored(
        self,
        weight: str,
        dense: Tensor,  # (out, in)
    ) -> Tensor:
        canonical, stored = vars(self)["_shapes"][weight]
        return self.builder.stored(dense.reshape(canonical), weight).reshape(stored)

    def observed(self, weight: str, observe: Callable[[Tensor], None]) -> Removable:
        """See `Host.attach_gradient`; the factors get no gradients."""
        observers = vars(self).setdefault(GRADIENT_OBSERVERS, {}).setdefault(weight, [])
        observers.append(observe)
        return _Observation(observers, observe)

    def options(self) -> dict[str, Any]:
        return {} if self.base is None else super().options()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles make the class again: it has no module to be imported from."""
        return _restored, (self.own_class, self.dense_class, self.base, self.weight_names), vars(self)


class _Observation:
    def __init__(self, observers: list[Callable[[Tensor], None]], observe: Callable[[Tensor], None]) -> None:
        self._observers, self._observe = observers, observe

    def remove(self) -> None:
        self._observers.remove(self._observe)


def _with_gradient_seen(weight: Tensor, observe: Callable[[Tensor], None]) -> Tensor:
    """Returns `weight`, whose gradient is given to `observe` in a backward pass."""
    if not torch.is_grad_enabled():
        return weight
    if not weight.requires_grad:
        weight = weight.detach().requires_grad_()
    weight.register_hook(observe)  # type: ignore[no-untyped-call]
    return weight


def _restored(
    own_class: type[InPlaceLayer], dense_class: type[nn.Module], base: Host | None, weights: tuple[str, ...]
) -> nn.Module:
    kind = in_place_class(own_class, dense_class, base, weights)
    return kind.__new__(kind)


_classes: dict[tuple[object, ...], type[InPlaceLayer]] = {}


def in_place_class(
    own_class: type[InPlaceLayer], dense_class: type[nn.Module], base: Host | None, weights: tuple[str, ...]
) -> type[InPlaceLayer]:
    """Returns the subclass of `dense_class` that holds the parameters `weights` as factors.

    Args:
        own_class: `InPlaceLayer`, or a subclass of it, which may have a ``forward`` of its own.
        base: the host of the layer type whose factorised layer computes with the parameter ``weight``, or None.
    """
    key = own_class, dense_class, base, weights
    if key in _classes:
        return _classes[key]
    generic = [weight for weight in weights if base is None or weight != "weight"]
    namespace: dict[str, Any] = {weight: _dense_on_demand(weight) for weight in generic}
    namespace |= {"own_class": own_class, "dense_class": dense_class, "base": base, "weight_names": weights}
    matrix_names = {weight: f"{weight}_{MATRIX}" for weight in weights}
    namespace["matrix_names"] = matrix_names if base is None else {**matrix_names, "weight": MATRIX}
    if base is not None and base.factorized is not None and "weight" in weights:
        namespace["weight"] = _lazy_or_observed(base.factorized)
    reads = generic or base is None or dense_class.forward is not getattr(base.layer, "forward", None)
    if reads and own_class.forward is InPlaceLayer.forward:
        namespace["forward"] = _building_once(dense_class)
    parents: tuple[type, ...] = (own_class, dense_class)
    if base is not None and base.layer is not None and base.factorized is not None:
        if dense_class is base.layer:
            parents = (own_class, base.factorized, dense_class)
        else:
            parents = (*parents, type(f"Factorized{base.layer.__name__}", (base.factorized, base.layer), {}))
    if issubclass(dense_class, nn.RNNBase):
        parents = (own_class, RecurrentWeights, *parents[1:])
    _classes[key] = type(f"Factorized{dense_class.__name__}", parents, namespace)
    return _classes[key]


def _dense_on_demand(weight: str) -> property:
    def read(self: InPlaceLayer) -> Tensor:
        return self.dense_weight(weight)

    return property(read, doc=f"`{weight}`, computed from its factors; read-only.")


def _lazy_or_observed(factorized: type[FactorizedModule]) -> property:
    """Returns the property ``weight`` of a factorised layer: in a call of ``forward``, the same tensor each time."""
    lazy = cast("Callable[[InPlaceLayer], Tensor]", cast(Any, factorized).weight.fget)

    def read(self: InPlaceLayer) -> Tensor:
        state = vars(self)
        if state.get(GRADIENT_OBSERVERS, {}).get("weight"):
            return self.dense_weight("weight")
        if state["_built"] is None:
            return lazy(self)
        return self.once_per_call("lazy weight", lambda: keep_in_cache(lazy(self)))

    return property(read, doc="The dense weight, computed from its factors on first use; read-only.")


def _building_once(dense_class: type[nn.Module]) -> Callable[..., Any]:
    """Returns ``dense_class.forward`` that computes each parameter at most once per call."""
    inner = dense_class.forward

    @functools.wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = vars(self)
        if is_recorded() or state["_built"] is not None:
            return inner(self, *args, **kwargs)
        state["_built"] = {}
        try:
            return inner(self, *args, **kwargs)
        finally:
            state["_built"] = None

    return forward


def dense_type(module: nn.Module) -> type[nn.Module]:
    """Returns the class of a dense module without parametrizations, or that of a factorised one before."""
    kind = type(module)
    if isinstance(module, InPlaceLayer):
        return module.dense_class
    is_parametrized = parametrize.is_parametrized(module)
    return cast("type[nn.Module]", kind.__bases__[0]) if is_parametrized else kind


def parametrized(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the tensors of a module that have parametrizations, such as ``weight_norm``."""
    if not parametrize.is_parametrized(module):
        return ()
    return tuple(cast(nn.ModuleDict, module.parametrizations))


def _without_parametrizations(layer: nn.Module, weights: Collection[str]) -> None:
    """Remove the parametrizations of `weights` from a shallow copy of a module; the original keeps them."""
    gone = set(parametrized(layer)) & set(weights)
    if not gone:
        return
    kept = shallow_copy(cast(nn.ModuleDict, layer.parametrizations))
    for weight in gone:
        del submodules_of(kept)[weight]
    if len(submodules_of(kept)):
        submodules_of(layer)["parametrizations"] = kept
    else:
        del submodules_of(layer)["parametrizations"]
        layer.__class__ = type(layer).__bases__[0]


def balanced(shape: Shape) -> Shape:
    """Returns the matrix shape, of consecutive dimensions joined, whose sides differ least."""
    splits = [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]
    return min(splits, key=lambda sides: (max(sides), sides))
