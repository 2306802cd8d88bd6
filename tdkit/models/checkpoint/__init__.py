"""Saved folders: what they say of a model, and how they are written and read."""

from tdkit.models.checkpoint.description import (
    DESCRIPTION,
    Layer,
    is_saved,
    place_of,
    read_description,
)
from tdkit.models.checkpoint.reading import load
from tdkit.models.checkpoint.writing import save
from tdkit.models.shards import INDEX, WEIGHTS

__all__ = ["DESCRIPTION", "INDEX", "WEIGHTS", "Layer", "is_saved", "load", "place_of", "read_description", "save"]
