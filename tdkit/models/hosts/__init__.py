"""Layer types: how each holds its weights, and the factorised layer that replaces it; one file per type."""

from tdkit.models.hosts.base import FactorizedLayer, Host, Observer

__all__ = ["FactorizedLayer", "Host", "Observer"]
