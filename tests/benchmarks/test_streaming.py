"""The benchmark of streaming runs at toy size, and its page shows what it reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import streaming

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "streaming.md"


def test_it_makes_a_model_in_shards_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming.stream, "fit_step", streaming.fit_step)
    streaming.write_random_model(tmp_path / "model", SIZES)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) == 2
    figures = streaming.measure(tmp_path / "model", tmp_path / "out", calibrated=None, layers=None)
    assert 0 < figures["fit_seconds"] < figures["seconds"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert streaming.measure_pass(tmp_path / "model", 16)["peak_bytes"] > 0


def test_the_page_shows_the_report() -> None:
    assert streaming.report() in PAGE.read_text(encoding="utf-8")


def test_the_bars_are_met() -> None:
    known = streaming.json.loads(streaming.RESULTS.read_text(encoding="utf-8"))
    assert known["plain"]["params"] > 1e9
    assert known["plain"]["peak_bytes"] < 2 * 2**30
    assert known["plain"]["ratio"] < 1.3
    assert known["calibrated"]["peak_bytes"] < 2 * 2**30
