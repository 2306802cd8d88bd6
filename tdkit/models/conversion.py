"""Plain layers of torch in place of factorised ones: the dense layers again, or the factors one after the other."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from tdkit.errors import OptionError, TdkitError, did_you_mean
from tdkit.models.hosts.base import FactorizedModule, become, transfer, unsupported
from tdkit.models.hosts.registered import builder_of, dense_layer
from tdkit.models.hosts.sequential import PlainStages
from tdkit.models.sites import changes_in_place, factorized_groups, factorized_layers, replace_module
from tdkit.models.ties import follow_ties
from tdkit.support.compatibility import holds_parameters, offloads

M = TypeVar("M", bound=nn.Module)

Patterns = str | Sequence[str]


def to_dense(model: M, *, only: Patterns = "*") -> M:
    """Replace factorised layers by dense ones with the same outputs, in place: the reverse of `tdkit.compress`.

    The layers are of their original classes again, with new weights computed from the factors. Ties, biases, hooks,
    `requires_grad`, dtype, device and mode are kept. An embedding whose padding row is zero gives that row to the
    head that it is tied to. Optimizers of the factors know nothing of the new weights.

    Args:
        model: a compressed model. While it is converted, memory holds the factors and the dense weights.
        only: globs of layer names (``*`` also matches dots). Layers that share a weight with a selected one follow.

    Returns:
        The same model.

    Raises:
        OptionError: when a pattern of `only` matches no factorised layer.
        TdkitError: when factors are offloaded or distributed; the model is unchanged.
        RegistryError: when the host of a layer is not installed; the model is unchanged.
    """
    layers = _selected(model, only)
    with torch.inference_mode(False), torch.no_grad():
        dense = {id(layer): dense_layer(layer) for layer in layers.values()}
    weights: dict[int, Tensor] = {}  # by the id of a matrix
    for layer in layers.values():
        for weight, matrix in layer.matrices.items():
            own = getattr(dense[id(layer)], weight)
            first = weights.setdefault(id(matrix), own)
            if first.shape == own.shape:
                setattr(dense[id(layer)], weight, first)
    _replace(model, layers, dense)
    return model


def to_sequential(model: M, *, only: Patterns = "*") -> M:
    """Replace factorised layers by ``torch.nn.Sequential`` of plain layers, one for each factor, in place.

    A low-rank ``Linear`` becomes two ``Linear``, an ``Embedding`` an ``Embedding`` and a ``Linear``, and a convolution
    two to four convolutions, for low rank, Tucker, CP and spatial low rank. Engines that know no factors run them as
    they run any model; the number of parameters is that of the factors, except that an embedding does not share the
    smaller factor with a tied head. Layers whose factors are no chain of plain layers, such as Kronecker sums, stay
    as they are: a warning names them.

    Args:
        model: a compressed model.
        only: as for `to_dense`.

    Returns:
        The same model.

    Raises:
        OptionError: when a pattern of `only` matches no factorised layer.
        TdkitError: when no layer can be replaced, or factors are offloaded or distributed; the model is unchanged.
        RegistryError: when the host of a layer is not installed; the model is unchanged.
    """
    layers = _selected(model, only)
    stages = PlainStages()
    chains: dict[int, nn.Module] = {}
    left: dict[str, str] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in layers.items():
            chain = chains.get(id(layer)) or builder_of(layer).sequential(layer, stages)
            if chain is None:
                kinds = {matrix.decomposition.describe() for matrix in layer.matrices.values()}
                left[name] = f"{name} ({layer.replaces}, {', '.join(sorted(kinds))})"
            elif id(layer) not in chains:
                transfer(layer, chain)
                chains[id(layer)] = chain.train(layer.training)
    if left:
        what = f"no plain layers, one after the other, compute the factors of {', '.join(left.values())}"
        if not chains:
            raise TdkitError(f"{what}: convert them with tdkit.to_dense, or export the model as it is")
        warnings.warn(f"{what}: they stay as they are", stacklevel=2)
    _replace(model, {name: layer for name, layer in layers.items() if name not in left}, chains)
    return model


def _selected(model: nn.Module, only: Patterns) -> dict[str, FactorizedModule]:
    """Returns the factorised layers that patterns select, and those that share a weight with them, by every name."""
    patterns = [only] if isinstance(only, str) else list(only)
    layers = dict(factorized_layers(model))
    found: set[int] = set()
    for pattern in patterns:
        matched = {id(layer) for name, layer in layers.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matched and pattern != "*":
            hint = did_you_mean(pattern, list(layers))
            raise OptionError(f"only={pattern!r} matches none of the {len(layers)} factorised layers{hint}")
        found |= matched
    groups = [{id(user.module) for user in users} for _, users in factorized_groups(model)]
    while True:
        more = set().union(*(group for group in groups if group & found)) - found
        if not more:
            break
        found |= more
    selected = {name: layer for name, layer in layers.items() if id(layer) in found}
    holder = next((type(module).__name__ for module in model.modules() if holds_parameters(module)), None)
    if selected and holder is not None:
        raise TdkitError(f"{holder} holds the parameters of this model: convert it before it is wrapped or sharded")
    for name, layer in selected.items():
        _check_present(name, layer)
    return selected


def _check_present(name: str, layer: FactorizedModule) -> None:
    """Check that the numbers of a layer are in memory, in plain tensors.

    Raises:
        TdkitError: when they are not.
    """
    if any(offloads(module) for module in layer.modules()):
        raise TdkitError(
            f"{name} is offloaded by accelerate: take its hooks off first, with "
            "accelerate.hooks.remove_hook_from_submodules(model), or load the model without a device_map"
        )
    for matrix in layer.matrices.values():
        for factor in matrix.parameters():
            reason = unsupported(factor)
            if reason is not None:
                raise TdkitError(f"{name} cannot be converted: of one of its factors, {reason}")


def _replace(model: nn.Module, layers: dict[str, FactorizedModule], plain: dict[int, nn.Module]) -> None:
    """Put plain layers, by the id of the factorised layer, in the places of factorised ones."""
    builders = {id(layer): builder_of(layer) for layer in layers.values()}
    changed: set[int] = set()
    for name, layer in layers.items():
        if not changes_in_place(builders[id(layer)], name):
            replace_module(model, name, plain[id(layer)])
        elif id(layer) not in changed:
            changed.add(id(layer))
            become(layer, plain[id(layer)])
    follow_ties(model, replaced=layers)
