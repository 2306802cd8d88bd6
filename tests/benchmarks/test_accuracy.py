"""The accuracy benchmark stores each row at once, keeps what is there, and says which bars are met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tdkit
from tdkit.sources.models import Source
from tests.benchmarks.accuracy import DECOMPOSITIONS, METHODS, PUBLISHED, SCOPES, Scope, Store, compressed, rows
from tests.conftest import make_llama


def row(name: str, scope: str, perplexity: float) -> dict[str, Any]:
    took = {"params": 10, "kept": 0.8, "plan_seconds": 1.0, "fit_seconds": 2.0, "seed": 0}
    return {"row": name, "scope": scope, "perplexity": perplexity, **took}


def test_every_row_is_there_once() -> None:
    every = rows()
    assert len(set(every)) == len(every) == len(SCOPES) * (4 * len(METHODS) + 3 * 7 + 3 + 2)
    assert {*DECOMPOSITIONS, PUBLISHED} == {name.partition("/")[0] for name, _ in every}


def test_rows_are_kept_and_judged(tmp_path: Path) -> None:
    ids = torch.arange(10)
    store, beside = Store(tmp_path, ids, 1.0), Store(tmp_path, ids, 1.0)
    store.add(row("dense", "", 20.0))
    beside.add(row("low_rank/whitened", "80% of blocks", 100.0))  # a run at the same time
    store.add(row("low_rank/allocated", "80% of blocks", 34.0))
    store.add(row("low_rank/allocated", "90% of blocks", 26.0))
    again = Store(tmp_path, ids, 1.0)
    assert [r["row"] for r in again.found] == ["dense", "low_rank/allocated", "low_rank/whitened", "low_rank/allocated"]
    assert again.find("low_rank/whitened", "80% of blocks") is not None
    text = (tmp_path / "accuracy.md").read_text()
    assert "80% of blocks, best (low_rank/allocated) / peer: **0.34**, asked for at most 0.35: met" in text
    assert "90% of blocks, best (low_rank/allocated) / dense: **1.3**, asked for at most 1.25: not met" in text
    with pytest.raises(SystemExit, match="measured on other tokens"):
        Store(tmp_path, ids + 1, 1.0)
    assert len(json.loads((tmp_path / "accuracy.json").read_text())["rows"]) == 4


@pytest.mark.parametrize(
    "name",
    [f"low_rank/{method}" for method in ("plain", "whitened", "sequential", "sampled")]
    + ["auto/allocated", "auto/sequential", "joint/two passes", "shrink/allocated", "modegpt/allocated"],
)
def test_a_row_compresses_a_copy(name: str) -> None:
    model = make_llama()
    batches = [torch.randint(60, (2, 16)) for _ in range(3)]
    calibrations = {labels: tdkit.calibrate(model, batches, labels=labels) for labels in ("data", "sampled")}
    source = Source("tiny", model, None)
    results = [compressed(source, name, Scope("blocks", 0.7), calibrations.__getitem__) for _ in range(2)]
    small, took = results[0]
    assert took["params"] == sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    shrinks = name.startswith(("shrink", "modegpt"))  # by eight units, and eight queries of a head stay whole
    assert (0.4 if shrinks else 0.65) < took["kept"] <= (0.8 if shrinks else 0.7)
    assert took["plan"] == results[1][1]["plan"]
    assert torch.equal(small(batches[0]).logits, results[1][0](batches[0]).logits)
