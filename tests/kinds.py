"""The registered decompositions, by what they take."""

from __future__ import annotations

from tdkit.decompositions.registered import decompositions

OF_MATRICES = [name for name in decompositions.names() if 2 in decompositions.get(name).orders and name != "blocks"]
