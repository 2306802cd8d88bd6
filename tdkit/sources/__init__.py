"""Models and texts by name."""

from tdkit.sources.models import load_model, model_sources
from tdkit.sources.positions import check_positions
from tdkit.sources.source import ModelSource, Source, TextSource
from tdkit.sources.texts import encode, load_texts, spread_windows, text_sources, windows

__all__ = [
    "ModelSource",
    "Source",
    "TextSource",
    "check_positions",
    "encode",
    "load_model",
    "load_texts",
    "model_sources",
    "spread_windows",
    "text_sources",
    "windows",
]
