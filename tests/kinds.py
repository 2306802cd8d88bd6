"""The registered decompositions, by what they take."""

from __future__ import annotations

from tdkit.decompositions.registered import decompositions

OTHERS = ("blocks", "quantized", "shrink")  # of packed weights alone; as large as its factors; of groups of weights
OF_MATRICES = [name for name in decompositions.names() if 2 in decompositions.get(name).orders and name not in OTHERS]
