"""What becomes of each weight: policies, plans, and how a parameter budget is shared."""

from tdkit.planning.allocation import Choice, OpenSite
from tdkit.planning.allocators import Allocator, Request

__all__ = ["Allocator", "Choice", "OpenSite", "Request"]
