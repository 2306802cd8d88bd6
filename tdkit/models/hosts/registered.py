"""The hosts by name, and the host of a module."""

from __future__ import annotations

from torch import nn

from tdkit.models.hosts.base import Host
from tdkit.models.hosts.embedding import EmbeddingHost
from tdkit.models.hosts.linear import Conv1DHost, LinearHost

HOSTS: tuple[Host, ...] = (LinearHost(), Conv1DHost(), EmbeddingHost())


def host_of(module: nn.Module) -> Host | None:
    """The host of a module's exact type, or None."""
    return next((host for host in HOSTS if host.accepts(module)), None)
