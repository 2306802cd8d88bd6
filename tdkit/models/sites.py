"""The weights of a model that tdkit can factorise (sites), each with all the layers that use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import PolicyError
from tdkit.models.hosts.base import DENSE_SHAPE, FactorizedModule, Host, become, unsupported
from tdkit.models.hosts.in_place import parametrized
from tdkit.models.hosts.registered import builder_of, host_of
from tdkit.shapes import Shape
from tdkit.support.compatibility import COMPILED, offloads, parameters_of, saved_buffers_of


@dataclass(frozen=True)
class User:
    """One layer that uses a weight, referenced by name, so that a layer can be freed once it is replaced.

    Attributes:
        model: the model that contains the layer.
        layer: the name of the layer in the model.
        weight: the name of the weight in the layer.
        host: the host of the layer's type.
        kind: the layer's type as used in rules: 'Linear', 'Conv1D', 'Embedding'.
        multiplications: products with the weight per row of the layer's input; 0 for a look-up of rows.
    """

    model: nn.Module = field(repr=False)
    layer: str
    weight: str
    host: Host
    kind: str
    multiplications: int

    @property
    def name(self) -> str:
        """The name of the layer, followed by that of the weight unless it is ``weight``."""
        return weight_name(self.layer, self.weight)

    @property
    def module(self) -> nn.Module:
        """The module that has the layer's name now."""
        return self.model.get_submodule(self.layer)

    def is_of(self, types: Collection[str]) -> bool:
        """Returns whether the class of the layer, or one that it is derived from, has one of these names."""
        return self.kind in types or any(base.__name__ in types for base in type(self.module).__mro__)

    @property
    def tensor(self) -> Tensor:
        """The weight as a view (out, in) or (out, in, *kernel)."""
        return self.host.canonical(getattr(self.module, self.weight), self.weight)


@dataclass(frozen=True)
class Site:
    """One weight and the layers that use it, several if it is tied (an embedding and a language-model head).

    Attributes:
        users: the layers, in the model's order.
        shape: (out, in) or (out, in, *kernel).
        stored: the number of parameters that vanish with the weight, if not those of `shape`.
        stacked: whether the weight is a stack of matrices (members, out, in), such as those of experts.
        read: returns the weight as `weight` does, where the model does not hold its values.
    """

    users: tuple[User, ...]
    shape: Shape
    stored: int | None = None
    stacked: bool = False
    read: Callable[[], Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The name of the first user, which identifies the site."""
        return self.users[0].name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(user.name for user in self.users)

    @property
    def weight(self) -> Tensor:
        """The weight as a view of `shape`; `read` anew in each access where the model does not hold its values."""
        return self.users[0].tensor if self.read is None else self.read()

    def finite_weight(self) -> Tensor:
        """Returns `weight` without its graph.

        Raises:
            PolicyError: when it has NaN or infinite entries.
        """
        weight = self.weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise PolicyError(f"{self.name} holds NaN or infinite weights: repair it, or keep it with a rule")
        return weight

    @property
    def params(self) -> int:
        return math.prod(self.shape) if self.stored is None else self.stored

    @property
    def kinds(self) -> tuple[str, ...]:
        """The layer types of the users, as used in rules."""
        return tuple(user.kind for user in self.users)

    @property
    def multiply_adds(self) -> int:
        """The multiply-adds of the dense weight for one row of the input, which meets one member of a stack."""
        return math.prod(self.shape[self.stacked :])

    def multiplications(self) -> int:
        """Returns the sum of `User.multiplications` over the users; look-ups count as 0."""
        return sum(user.multiplications for user in self.users)


@dataclass(frozen=True)
class Untouchable:
    """A layer with a weight of two or more dimensions that tdkit cannot factorise.

    Attributes:
        name: the name of the weight, as in `weight_name`.
        kind: the type of the layer.
        params: the number of parameters that hold the weight, more or fewer than its entries if it is parametrised; 0
            while it is uninitialised.
        reason: why it cannot be factorised.
        shape: as the layer stores it; empty while it is uninitialised.
        others: the names of the other layers that share it.
    """

    name: str
    kind: str
    params: int
    reason: str
    shape: Shape = ()
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.others)


@dataclass(frozen=True)
class Survey:
    """The weights of a model.

    Attributes:
        sites: the weights that can be factorised.
        untouchable: the weights that cannot.
        factorized: the names of the weights that are factorised already, each once.
    """

    sites: tuple[Site, ...]
    untouchable: tuple[Untouchable, ...]
    factorized: tuple[str, ...] = ()


def survey(model: nn.Module, read: Callable[[User], Tensor] | None = None) -> Survey:
    """Find every weight of `model` that can be factorised, with all the layers that share it.

    Args:
        read: returns the weight of a layer, where the model does not hold its values; see `Site.read`.
    """
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}  # by parameter: module name, module, attribute
    inside = tuple(f"{name}." for name, module in _modules(model) if isinstance(module, FactorizedMatrix))
    inside += tuple(f"{name}.parametrizations.".lstrip(".") for name, module in _modules(model) if parametrized(module))
    for name, module in _modules(model):
        if f"{name}.".startswith(inside):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter) or parameter.ndim >= 2:
                holders.setdefault(id(parameter), []).append((name, module, attribute))
        for attribute in parametrized(module):
            if getattr(module, attribute).ndim >= 2:
                held = getattr(module.parametrizations, attribute)
                holders.setdefault(id(held), []).append((name, module, attribute))
    sites, untouchable = [], []
    for found in holders.values():
        users, reason = _users(model, found)
        name, module, attribute = found[0]
        if reason is None:
            shape, stored = tuple(users[0].tensor.shape), users[0].host.params(module, attribute)
            stacked = users[0].host.stacked(module, attribute)
            stored_size = None if stored == math.prod(shape) else stored
            sites.append(Site(users, shape, stored_size, stacked, read and partial(read, users[0])))
        else:
            parameter = getattr(module, attribute)
            shape = () if is_lazy(parameter) else tuple(parameter.shape)
            first, *others = (weight_name(layer, weight) for layer, _, weight in found)
            host = host_of(module)
            params = 0 if not shape else math.prod(shape) if host is None else host.params(module, attribute)
            untouchable.append(Untouchable(first, type(module).__name__, params, reason, shape, tuple(others)))
    factorized = tuple(users[0].name for _, users in factorized_groups(model))
    return Survey(tuple(sites), tuple(untouchable), factorized)


def weight_name(layer: str, weight: str) -> str:
    """Returns the name of a weight: that of its layer, followed by its own unless that is ``weight``."""
    return layer if layer and weight == "weight" else f"{layer}.{weight}".lstrip(".")


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from model.named_modules(remove_duplicate=False)


def _users(model: nn.Module, found: list[tuple[str, nn.Module, str]]) -> tuple[tuple[User, ...], str | None]:
    users = []
    for name, module, attribute in found:
        host = host_of(module)
        if host is None or attribute not in host.weights(module):
            shared = f", which shares it with {found[0][0]}" if len(found) > 1 and name != found[0][0] else ""
            what = "its layer has factors already" if host is None else f"{attribute} is no weight that its host knows"
            return (), f"{what}{shared}"
        if offloads(module):
            return (), "device_map offloads its layer: load the model without, compress it and dispatch it afterwards"
        refusal = unsupported(getattr(module, attribute)) or host.refusal(module, attribute)
        if refusal is not None:
            return (), refusal
        kind, times = type(module).__name__, host.multiplications(module, attribute)
        users.append(User(model, name, attribute, host, kind, times))
    if len({tuple(user.tensor.shape) for user in users}) > 1:
        return (), f"tied layers {', '.join(u.name for u in users)} hold it in different layouts"
    return tuple(users), None


def uninitialized(model: nn.Module) -> list[str]:
    """Returns the names of the uninitialised parameters, those of lazy layers."""
    return [name for name, parameter in model.named_parameters() if is_lazy(parameter)]


def factorized_layers(model: nn.Module) -> Iterator[tuple[str, FactorizedModule]]:
    """Iterate over (name, factorised layer) in the model's order; a layer with several names appears with each."""
    for name, module in _modules(model):
        if isinstance(module, FactorizedModule):
            yield name, module


@dataclass(frozen=True)
class FactorizedUser:
    """One factorised layer that uses a matrix.

    Attributes:
        layer: the name of the layer in the model.
        module: the layer.
        weight: the name of the dense weight that the matrix replaces.
    """

    layer: str
    module: FactorizedModule
    weight: str

    @property
    def name(self) -> str:
        """See `User.name`."""
        return weight_name(self.layer, self.weight)

    @property
    def multiplications(self) -> int:
        """See `User.multiplications`."""
        return builder_of(self.module).multiplications(self.module, self.weight)


def factorized_groups(model: nn.Module) -> list[tuple[FactorizedMatrix, list[FactorizedUser]]]:
    """Returns every factorised matrix with the layers that share it."""
    groups: dict[int, tuple[FactorizedMatrix, list[FactorizedUser]]] = {}
    for name, layer in factorized_layers(model):
        for weight, matrix in layer.matrices.items():
            groups.setdefault(id(matrix), (matrix, []))[1].append(FactorizedUser(name, layer, weight))
    return list(groups.values())


def resized_layers(model: nn.Module) -> Iterator[tuple[str, Shape, Shape]]:
    """Iterate over (name, shape, dense shape) of the layers that `Shrink` made smaller; shapes are (out, in)."""
    for name, module in _modules(model):
        dense = vars(module).get(DENSE_SHAPE)
        host = host_of(module) if dense is not None else None
        if dense is not None and host is not None:
            yield name, tuple(host.canonical(parameters_of(module)["weight"], "weight").shape), dense


def is_compressed(model: nn.Module) -> bool:
    """Returns whether a model has factorised layers or resized ones."""
    return any(isinstance(module, FactorizedModule) or DENSE_SHAPE in vars(module) for module in model.modules())


def num_params(model: nn.Module) -> int:
    """Returns the number of parameters of a model, those of quantized factors included; tied ones are counted once."""
    rounded = sum(module.held_as_buffers for module in model.modules() if isinstance(module, FactorizedMatrix))
    return sum(p.numel() for p in model.parameters()) + rounded


def num_bytes(model: nn.Module) -> int:
    """Returns the bytes of the tensors in the ``state_dict`` of a model; tied ones are counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct_tensors(model))


def distinct_tensors(model: nn.Module) -> list[Tensor]:
    """Returns the tensors in the ``state_dict`` of a model, tied ones once; also of a model on the meta device."""
    held = [*model.parameters(), *(buffer for module in model.modules() for buffer in saved_buffers_of(module))]
    return list({tensor.data_ptr() or id(tensor): tensor for tensor in held}.values())


def changes_in_place(host: Host, layer: str) -> bool:
    """Returns whether the layer of this name becomes the factorised one, instead of being replaced by it.

    The model itself has no parent to hold another module, and the wrapper of ``torch.compile`` calls the one it got.
    """
    return host.in_place or not layer or f"{layer}.".endswith(COMPILED)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called `name` by `module`; the model itself, called ``""``, becomes it."""
    if not name:
        if model is not module:
            become(model, module)
        return
    parent_name, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child, module)
