"""Hosts: the layer types that can be factorised, each with the factorised layer that replaces it."""

from tdkit.models.hosts.base import FactorizedLayer, FactorizedModule, Host, Observer

__all__ = ["FactorizedLayer", "FactorizedModule", "Host", "Observer"]
