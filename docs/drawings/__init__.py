"""The drawings of the documentation: ``python -m docs.drawings`` writes them to docs/images."""

from __future__ import annotations

from docs.drawings.concepts import CONCEPTS
from docs.drawings.decompositions import DECOMPOSITIONS
from docs.drawings.svg import Drawing

DRAWINGS: dict[str, Drawing] = {**DECOMPOSITIONS, **CONCEPTS}
