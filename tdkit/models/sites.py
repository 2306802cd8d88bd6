"""Every weight of a model that tdkit can rewrite, with all the layers that use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdkit.models.hosts.base import FactorizedLayer, Host
from tdkit.models.hosts.registered import host_of
from tdkit.shapes import Shape


@dataclass(frozen=True)
class User:
    """One layer that uses a weight."""

    name: str
    module: nn.Module
    host: Host


@dataclass(frozen=True)
class Site:
    """One weight matrix and its users; several when it is tied (an embedding and a language-model head)."""

    users: tuple[User, ...]

    @property
    def name(self) -> str:
        """The first user's name, which stands for the site."""
        return self.users[0].name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(user.name for user in self.users)

    @property
    def weight(self) -> Tensor:
        """The weight as an (out, in) view."""
        user = self.users[0]
        weight = user.module.weight
        assert isinstance(weight, Tensor)
        return user.host.matrix(weight)

    @property
    def shape(self) -> Shape:
        weight = self.weight
        return weight.shape[0], weight.shape[1]

    @property
    def params(self) -> int:
        return self.weight.numel()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The layer types of the users, as rules name them: 'Linear', 'Conv1D', 'Embedding'."""
        return tuple(type(user.module).__name__ for user in self.users)

    def multiplications(self) -> int:
        """How many of the users multiply by the weight, rather than look up its rows."""
        return sum(user.host.multiplies() for user in self.users)


@dataclass(frozen=True)
class Untouchable:
    """A layer with a weight of two or more dimensions that tdkit does not rewrite, and why."""

    name: str
    kind: str
    params: int
    reason: str


@dataclass(frozen=True)
class Survey:
    """What a model offers: the sites, and the weights that stay as they are."""

    sites: tuple[Site, ...]
    untouchable: tuple[Untouchable, ...]


def survey(model: nn.Module) -> Survey:
    """Find every rewritable weight of `model` and group the layers that share it."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}  # by parameter: module name, module, attribute
    inside = tuple(f"{name}." for name, _ in factorized_layers(model))
    for name, module in model.named_modules(remove_duplicate=False):
        if f"{name}.".startswith(inside):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                holders.setdefault(id(parameter), []).append((name, module, attribute))
    sites, untouchable = [], []
    for found in holders.values():
        users, reason = _users(found)
        if reason is None:
            sites.append(Site(users))
        else:
            name, module, attribute = found[0]
            label = name if attribute == "weight" else f"{name}.{attribute}".lstrip(".")
            params = getattr(module, attribute).numel()
            untouchable.append(Untouchable(label, type(module).__name__, params, reason))
    return Survey(tuple(sites), tuple(untouchable))


def _users(found: list[tuple[str, nn.Module, str]]) -> tuple[tuple[User, ...], str | None]:
    users = []
    for name, module, attribute in found:
        host = host_of(module) if attribute == "weight" else None
        if not name:
            return (), "the model is a single layer: wrap it in a module that holds it by name"
        if host is None:
            shared = f", which shares it with {found[0][0]}" if len(found) > 1 and name != found[0][0] else ""
            return (), f"{type(module).__name__} is not a layer that tdkit rewrites{shared}"
        if "forward" in vars(module):
            return (), "its forward was replaced on the instance (device_map does so), which a new layer would lose"
        refusal = host.refusal(module)
        if refusal is not None:
            return (), refusal
        users.append(User(name, module, host))
    if len({tuple(user.host.matrix(_weight(user)).shape) for user in users}) > 1:
        return (), f"tied layers {', '.join(u.name for u in users)} hold it in different layouts"
    return tuple(users), None


def _weight(user: User) -> Tensor:
    assert isinstance(user.module.weight, Tensor)
    return user.module.weight


def factorized_layers(model: nn.Module) -> Iterator[tuple[str, FactorizedLayer]]:
    """Every factorised layer under every name it has, in the model's order."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FactorizedLayer):
            yield name, module


def factorized_groups(model: nn.Module) -> list[list[tuple[str, FactorizedLayer]]]:
    """The factorised layers grouped by the matrix they share."""
    groups: dict[int, list[tuple[str, FactorizedLayer]]] = {}
    for name, layer in factorized_layers(model):
        groups.setdefault(id(layer.matrix), []).append((name, layer))
    return list(groups.values())


def num_params(model: nn.Module) -> int:
    """Parameters of a model, a tied one counted once."""
    return sum(p.numel() for p in model.parameters())


def num_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a saved model holds, tied ones counted once."""
    tensors: dict[int, torch.Tensor] = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place that `name` says."""
    parent_name, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child, module)
