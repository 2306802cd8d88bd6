"""Models and texts by name."""

from tdkit.sources.models import Source, load_model
from tdkit.sources.texts import encode, load_texts, spread_windows, windows

__all__ = ["Source", "encode", "load_model", "load_texts", "spread_windows", "windows"]
