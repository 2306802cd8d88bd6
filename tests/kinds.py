"""The registered decompositions, by what they take."""

from __future__ import annotations

from tdkit.decompositions.registered import decompositions

OTHERS = ("blocks", "quantized")  # of packed weights alone, and as large as what it is made of
OF_MATRICES = [name for name in decompositions.names() if 2 in decompositions.get(name).orders and name not in OTHERS]
