"""The registry of hosts, and look-up of the host of a module."""

from __future__ import annotations

import warnings
from functools import cache

from torch import nn

from tdkit.errors import RegistryError, told_as
from tdkit.models.hosts.base import FactorizedModule, Host, transfer
from tdkit.models.hosts.guarded import guarded
from tdkit.models.hosts.in_place import MATRIX, InPlaceHost
from tdkit.registry import Registry, subclass_fault
from tdkit.support.compatibility import buffers_of, parameters_of, submodules_of

hosts: Registry[type[Host]] = Registry(
    "tdkit.hosts",
    "host",
    {
        "linear": "tdkit.models.hosts.linear:LinearHost",
        "conv1d": "tdkit.models.hosts.linear:Conv1DHost",
        "embedding": "tdkit.models.hosts.embedding:EmbeddingHost",
        "convolution1d": "tdkit.models.hosts.convolution:Convolution1dHost",
        "convolution2d": "tdkit.models.hosts.convolution:Convolution2dHost",
        "convolution3d": "tdkit.models.hosts.convolution:Convolution3dHost",
        "transposed_convolution1d": "tdkit.models.hosts.convolution:TransposedConvolution1dHost",
        "transposed_convolution2d": "tdkit.models.hosts.convolution:TransposedConvolution2dHost",
        "transposed_convolution3d": "tdkit.models.hosts.convolution:TransposedConvolution3dHost",
        "experts": "tdkit.models.hosts.experts:ExpertsHost",
        "transposed_experts": "tdkit.models.hosts.experts:TransposedExpertsHost",
    },
    fault=subclass_fault(Host),
)

LEFT = "the layers that it knows stay dense"


def host_of(module: nn.Module) -> Host | None:
    """Returns the host that accepts a module, else an `InPlaceHost`; None for a factorised layer.

    A layer type of torch that has more state than its class gives it, such as another parameter, gets an
    `InPlaceHost` as well, which keeps that state. A host of another package that fails to import, or in `accepts`, is
    skipped with a warning.

    Raises:
        RegistryError: when two hosts accept the module, or two packages provide a host of the same name.
    """
    found = [host for host in _all() if _accepts(host, module)]
    if len(found) > 1:
        names = " and ".join(f"'{host.name}'" for host in found)
        raise RegistryError(f"the hosts {names} both accept {type(module).__name__}: uninstall one of their packages")
    if not found:
        in_place = InPlaceHost(_base_of(module))
        return in_place if in_place.accepts(module) else None
    host = found[0]
    if host.layer is None or not (_is_special(module, host) or host.refusal(module, "weight")):
        return host
    return InPlaceHost(_base_of(module))


def _accepts(host: Host, module: nn.Module) -> bool:
    try:
        return host.accepts(module)
    except RegistryError as error:
        warnings.warn(f"{error}; {LEFT}", stacklevel=2)
        return False


def builder_of(layer: FactorizedModule) -> Host:
    """Returns the host that built a factorised layer.

    Raises:
        RegistryError: when it is not installed.
    """
    return layer.builder or _made(hosts.get(layer.host))


def _base_of(module: nn.Module) -> Host | None:
    """Returns the host of the nearest layer type that a module is an instance of."""
    by_layer: dict[type, Host] = {host.layer: host for host in _all() if host.layer is not None}
    base = next((by_layer[kind] for kind in type(module).__mro__ if kind in by_layer), None)
    if base is None or hasattr(module, MATRIX) or "weight" not in InPlaceHost(base).weights(module):
        return None
    return None if base.refusal(module, "weight") else base


def _is_special(module: nn.Module, host: Host) -> bool:
    """Returns whether a layer has other state than its type, or a replaced ``forward``."""
    own = {*parameters_of(module), *buffers_of(module), *submodules_of(module)}
    usual = {*host.weights(module), "bias"}
    return not own <= usual or "weight" not in own or "forward" in vars(module)


def dense_layer(layer: FactorizedModule) -> nn.Module:
    """Returns the dense equivalent of a factorised layer, with the same mode, hooks and `requires_grad`.

    Raises:
        RegistryError: when the host that built the layer is not installed.
    """
    dense = builder_of(layer).undo(layer)
    transfer(layer, dense)
    for name, matrix in layer.matrices.items():
        getattr(dense, name).requires_grad_(any(factor.requires_grad for factor in matrix.parameters()))
    return dense


@cache
def _all() -> tuple[Host, ...]:
    found = []
    for name, packages in hosts.origins().items():
        try:
            found.append(_made(hosts.get(name)))
        except RegistryError as error:
            if len(packages) > 1:
                raise
            warnings.warn(f"{error}; {LEFT}", stacklevel=2)
    return tuple(found)


def _made(kind: type[Host]) -> Host:
    with told_as(RegistryError, f"the host '{kind.name}' ({kind.__module__}) cannot be made"):
        return guarded(kind())
