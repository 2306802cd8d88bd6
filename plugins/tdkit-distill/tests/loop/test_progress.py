"""What a person sees of a run, and what the log keeps of one that was killed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from distill_models import gpt2, ids

from tdkit_distill import distill
from tdkit_distill.errors import StorageError
from tdkit_distill.loop.progress import Log

STAGE = {"name": "first", "losses": {"logits": 1.0, "hidden": 0.5}, "steps": 3, "batch_size": 4}


def test_the_live_view_shows_stage_terms_speed_and_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = distill(gpt2(1), gpt2(), STAGE, ids(), held_out=ids(4), progress=True)
    shown = capsys.readouterr().err
    assert "first 1/1" in shown
    assert "3/3" in shown
    assert "tok/s" in shown
    last = result.history[-2]["terms"]
    assert f"logits {last['logits']:.4g}  hidden {last['hidden']:.4g}" in " ".join(shown.split("\n"))
    assert f"held-out loss {result.held_out:.4f}" in shown
    assert re.search(r"\d+:\d\d:\d\d +(\d+:\d\d:\d\d|-:--:--)", shown), "time passed and time left"


def test_names_with_brackets_are_no_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stage = {**STAGE, "name": "[/INST] [bold]", "losses": {"logits@[/a]": 1.0}}
    distill(gpt2(1), gpt2(), stage, ids(), progress=True)
    shown = capsys.readouterr().err
    assert "[/INST] [bold] 1/1" in shown
    assert "logits@[/a] " in shown


def test_nothing_is_shown_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    distill(gpt2(1), gpt2(), STAGE, ids())
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_a_log_drops_what_was_written_after_the_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({"total": k, "loss": float(k)}) for k in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"total": 4, "lo']))
    log = Log(tmp_path, 2)
    log.add({"total": 3, "loss": 0.5})
    log.close()
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == log.entries
    assert kept[2].pop("clock") >= 0
    assert kept == [{"total": 1, "loss": 1.0}, {"total": 2, "loss": 2.0}, {"total": 3, "loss": 0.5}]


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    with pytest.raises(StorageError, match="another process trains in"):
        Log(tmp_path, 0)
    log.close()
    Log(tmp_path, 0).close()
