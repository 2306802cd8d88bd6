"""The tables of the benchmark of healing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.benchmarks.healing import EVALUATION_TEXT, ROWS, Store, markdown


def row(name: str, tokens: int, after: dict[str, float]) -> dict[str, Any]:
    curve = [[tokens * k // 5, 10 * k, 40.0 - k, 90.0] for k in range(6)] if tokens > 10_000 else [[0, 0, 40.0, 90.0]]
    before = dict.fromkeys(after, 40.0)
    shared = {"keep": 0.6, "tokens_per_second": 90.0, "seconds": 3600, "dense": {"held out": 20.0, "other": 10.0}}
    return {"row": name, "tokens": tokens, "before": before, "after": after, "curve": curve, **shared}


def test_rows_are_kept_and_shown(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.form["setting"] = {"model": "small", "dense_on_evaluation": 23.79}
    long = row("all", 100_000, {"held out": 30.0, "other": 80.0, EVALUATION_TEXT: 31.0})
    store.form["rows"] = [long, row("factors", 4096, {"held out": 35.0, "other": 85.0})]
    store.write()
    again = Store(tmp_path)
    assert again.find("all", 0.6, 100_000)
    assert not again.find("all", 0.8, 100_000)
    lines = (tmp_path / "healing.md").read_text().splitlines()
    assert f"- dense: held out 20.0, other 10.0, {EVALUATION_TEXT} 23.79" in lines
    assert "| 4,096 | factors | 40.0 → 35.0 | 40.0 → 85.0 |  | 90 | 3,600 |" in lines
    assert "| 100,000 | all | 40.0 → 30.0 | 40.0 → 80.0 | 40.0 → 31.0 | 90 | 3,600 |" in lines
    assert "### all, 100,000 tokens" in lines
    assert "| 60,000 | 30 | 37.0 | 90.0 |" in lines
    assert markdown(again.form) == (tmp_path / "healing.md").read_text()


def test_every_row_differs_from_the_others() -> None:
    assert len({repr(row) for row in ROWS.values()}) == len(ROWS)
