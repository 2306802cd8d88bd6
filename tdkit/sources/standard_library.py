"""The texts that Python itself carries: its language reference and the source of its standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from tdkit.errors import SourceError, did_you_mean

PARTS = ("reference", "source")


def load_python(part: str | None) -> list[str]:
    """Python's language reference (python:reference), or the modules of its standard library (python:source)."""
    if part not in PARTS:
        name = "python" if part is None else f"python:{part}"
        known = [f"python:{each}" for each in PARTS]
        raise SourceError(f"no text '{name}'{did_you_mean(name, known) or '.'} Known: {', '.join(known)}")
    return _reference() if part == "reference" else _source()


def _reference() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise SourceError(
            "this Python has no pydoc_data, which some distributions of it pack apart: install their full Python"
        ) from None
    return [text for _, text in sorted(topics.items())]


def _source() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise SourceError("this Python has its standard library in no folder of .py files")
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]
