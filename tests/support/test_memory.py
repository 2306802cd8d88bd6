"""The memory of the machine, or of the container where that has less."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdkit.support import memory


def test_it_is_there_and_free_memory_is_part_of_it() -> None:
    total, free = memory.memory()
    assert total is not None
    assert total > 2**28
    assert free is None or 0 <= free <= total


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("1048576\n")
    (tmp_path / "current").write_text("1000000\n")
    monkeypatch.setattr(memory, "LIMIT", tmp_path / "max")
    monkeypatch.setattr(memory, "USED", tmp_path / "current")
    assert memory.memory() == (1048576, 48576)
    (tmp_path / "max").write_text("max\n")
    assert memory.memory()[0] != 1048576
