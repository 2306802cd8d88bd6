"""A seeded share of every part; ``make test-hostile`` runs all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.report import SEEDED

ROOT = Path(__file__).parents[2]


@pytest.mark.hostile
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "names", [("files", "numbers", "plugins", "memory"), ("kills", "faults", "exceptions")], ids=str
)
def test_nothing_bad_comes_of_it(names: tuple[str, ...], tmp_path: Path) -> None:
    """In a process of its own, which forks."""
    command = [sys.executable, "-m", "tests.hostile.report", *names, "--seeded", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = (tmp_path / "reliability.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == len(names) + 1  # what was found and mended
    assert set(SEEDED) >= set(names)
