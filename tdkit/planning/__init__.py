"""Policies, plans, and the allocation of a parameter budget to the layers of a model."""

from tdkit.planning.allocation import Choice, OpenSite
from tdkit.planning.allocators import Allocator, Request

__all__ = ["Allocator", "Choice", "OpenSite", "Request"]
