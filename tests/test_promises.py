"""Every promise of docs/promises.md names the test that proves it, and the test is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = [
    cells
    for table in re.findall(r"(?m)^\|.*\btest \|\n\|[ |-]+\n((?:\|.*\n)+)", PAGE)
    for cells in (re.split(r" \| ", row.strip("| ")) for row in table.splitlines())
]
DEFINED = {
    name
    for folder in (ROOT / "tests", *(ROOT / "plugins").glob("*/tests"))
    for file in folder.rglob("test_*.py")
    for name in re.findall(r"(?m)^ *def (test_\w+)\(", file.read_text(encoding="utf-8"))
}


def exists(name: str) -> bool:
    """Whether a file, a test function or a module is in the repository."""
    if name.startswith("test_"):
        return name in DEFINED
    if name.startswith("tests/"):
        return (ROOT / name).is_file()
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_the_proof_of_a_promise_exists(row: list[str]) -> None:
    named = re.findall(r"`([^`]+)`", row[-1])
    assert named, "no test is named"
    assert all(map(exists, named)), [name for name in named if not exists(name)]


def test_every_promise_is_looked_at() -> None:
    assert len(ROWS) == sum(line.startswith("| ") for line in PAGE.splitlines()) - 2 * PAGE.count("| --- |\n")
    assert not exists("test_that_nobody_wrote")
    assert not exists("tests/nowhere.py")
