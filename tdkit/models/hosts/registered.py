"""The registry of hosts, and look-up of the host of a module."""

from __future__ import annotations

import warnings
from functools import cache

from torch import nn

from tdkit.errors import RegistryError
from tdkit.models.hosts.base import FactorizedLayer, Host, transfer
from tdkit.registry import Registry, subclass_fault

hosts: Registry[type[Host]] = Registry(
    "tdkit.hosts",
    "host",
    {
        "linear": "tdkit.models.hosts.linear:LinearHost",
        "conv1d": "tdkit.models.hosts.linear:Conv1DHost",
        "embedding": "tdkit.models.hosts.embedding:EmbeddingHost",
        "convolution": "tdkit.models.hosts.convolution:ConvolutionHost",
        "transposed_convolution": "tdkit.models.hosts.convolution:TransposedConvolutionHost",
    },
    fault=subclass_fault(Host),
)


def host_of(module: nn.Module) -> Host | None:
    """Returns the host that accepts a module, or None.

    A host of another package that fails to import is skipped with a warning.

    Raises:
        RegistryError: when two hosts accept the module, or two packages provide a host of the same name.
    """
    found = [host for host in _all() if host.accepts(module)]
    if len(found) > 1:
        names = " and ".join(f"'{host.name}'" for host in found)
        raise RegistryError(f"the hosts {names} both accept {type(module).__name__}: uninstall one of their packages")
    return found[0] if found else None


def dense_layer(layer: FactorizedLayer) -> nn.Module:
    """Returns the dense equivalent of a factorised layer, with the same mode, hooks and `requires_grad`.

    Raises:
        RegistryError: when the host that built the layer is not installed.
    """
    dense = hosts.get(layer.host)().undo(layer)
    transfer(layer, dense)
    for name, matrix in layer.matrices.items():
        getattr(dense, name).requires_grad_(any(factor.requires_grad for factor in matrix.parameters()))
    return dense


@cache
def _all() -> tuple[Host, ...]:
    found = []
    for name, packages in hosts.origins().items():
        try:
            kind = hosts.get(name)
        except RegistryError as error:
            if len(packages) > 1:
                raise
            warnings.warn(f"{error}; the layers that it knows stay dense", stacklevel=2)
            continue
        found.append(kind())
    return tuple(found)
