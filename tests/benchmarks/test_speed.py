"""The speed benchmark refuses a device that is not there, and its page for a GPU says which bars are met."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tdkit import Decomposition
from tests.benchmarks import speed_convolutions
from tests.benchmarks.speed_cuda import bars, write

SCRIPT = Path(__file__).parent / "speed.py"


def row(shape: str, tokens: int, by_floor: float, speed: float) -> dict[str, Any]:
    texts = {"shape": shape, "decomposition": "low_rank(rank=8)", "memory_path": "fused", "speed_path": "fused"}
    times = dict.fromkeys(("dense_us", "memory_us", "memory", "speed_us", "floor_us", "share"), 0.5)
    return {**texts, **times, "tokens": tokens, "speed": speed, "memory_by_floor": by_floor}


def test_bars_take_the_worst_figure_of_what_they_are_about(tmp_path: Path) -> None:
    rows = [row("4096x4096", 1, 1.5, 0.4), row("4096x4096", 8, 9.0, 1.2), row("768x768", 1, 7.0, 0.9)]
    assert [bar[1:] for bar in bars(rows)] == [["<= 2", "1.5", "yes"], ["<= 1.1", "1.2", "no"]]
    machine = {"gpu": "a GPU", "cache_mib": 50.0, "copy_gb_per_second": 3000.0, "torch": "2", "cuda": "13"}
    write({"machine": {**machine, "dtype": "bfloat16"}, "rows": rows}, tmp_path)
    page = (tmp_path / "speed-cuda.md").read_text(encoding="utf-8")
    assert "| 768x768 | low_rank(rank=8) | 0.5 | 1 |" in page
    assert "copied 3000 GB/s" in page
    assert json.loads((tmp_path / "speed-cuda.json").read_text(encoding="utf-8"))["rows"] == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ["--device", "cuda", "--dtype", "bfloat16"],
            "torch finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--dtype", "bfloat16"], "the figures of a CPU are in float32"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("kind", speed_convolutions.KINDS, ids=lambda kind: kind.name)
def test_convolutions_are_measured_at_half_the_multiply_adds(kind: Decomposition) -> None:
    choice, share = speed_convolutions.halved(kind, speed_convolutions.Case(64, 64, 8))
    assert choice.is_complete() or kind.name == "spatial_low_rank"
    assert 0.45 < share <= 0.5
    (row, *_) = speed_convolutions.measure(0.001, [(speed_convolutions.Case(64, 64, 8), kind)])
    assert row["layer"] == "64 to 64, 3x3, on 8x8"
    assert {row["memory_path"], row["speed_path"]} <= {"chain", "dense", "dense, cached"}
    assert speed_convolutions.half_of_3x3([{**row, "layer": str(speed_convolutions.RESNET[0])}]) == (
        [row["speed"]] if kind.name in ("low_rank", "tucker") else []
    )
