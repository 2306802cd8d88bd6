"""``tdkit bench`` on a dense model with a policy, and on a folder that was compressed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.cli.command import Result, run

Tdkit = Callable[..., Result]
QUICK = ("--tokens", "1,4", "--seconds", "0.01")


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return partial(run, capsys, monkeypatch)


def test_a_policy_is_tried_on_a_dense_model(tdkit: Tdkit, gpt2_folder: Path) -> None:
    result = tdkit("bench", gpt2_folder, "--match", "*.c_fc", "--with", "{low_rank: {rank: 4}}", *QUICK, "--json")
    assert result.code == 0, result.err
    rows = json.loads(result.out)["rows"]
    assert [row["tokens"] for row in rows] == [1, 4, 1, 4]
    assert rows[0]["what"] == "Conv1D 192x48 low_rank(rank=4)"
    assert rows[0]["count"] == 2
    assert rows[-1]["what"] == "whole model"
    assert "random factors" in result.err


def test_a_compressed_folder_is_measured_as_it_is(tdkit: Tdkit, gpt2_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    assert tdkit("compress", gpt2_folder, "--out", folder, "--match", "*.c_fc", "--budget", "0.9").code == 0
    result = tdkit("bench", folder, "--train", *QUICK)
    assert result.code == 0, result.err
    assert "training step, float32, cpu" in result.out
    assert "whole model" in result.out


def test_tokens_must_be_counts(tdkit: Tdkit, gpt2_folder: Path) -> None:
    result = tdkit("bench", gpt2_folder, "--tokens", "1,many")
    assert result.code == 2
    assert "--tokens '1,many' must be positive integers" in result.err
