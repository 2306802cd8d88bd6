"""The benchmark of real models on a small convolutional network: rows, peers, page and picture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdkit.errors import MissingDependencyError
from tdkit.models.sites import num_params
from tests.benchmarks import any_model_peers as peers
from tests.benchmarks import any_model_report as report
from tests.benchmarks.any_model import Bench, run
from tests.real import packages
from tests.real.task import Task, multiply_adds, percent


def small_task() -> Task:
    """Whether the left or the right half of an image is brighter."""
    torch.manual_seed(0)
    images = torch.randn(200, 1, 12, 12)
    labels = (images[..., :6].mean((1, 2, 3)) < images[..., 6:].mean((1, 2, 3))).long()
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 2)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[:100]), labels[:100]).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)

    def judge(logits: Tensor) -> float:
        return percent(logits.argmax(-1) == labels[100:])

    train = {"input": images[:100], "labels": labels[:100]}
    return Task("halves", "halves", "accuracy", model.eval(), train, (images[100:],), judge, steps=5)


def test_rows_are_computed_once_and_stored(tmp_path: Path) -> None:
    names = ("plain", "calibrated", "distilled")
    for _ in range(2):
        run("halves", small_task, tmp_path, names.__contains__)
    rows = report.read(tmp_path)["halves"]["rows"]
    assert [(row["method"], row["keep"]) for row in rows] == [
        *(("dense", 1.0), ("plain", 0.7), ("plain", 0.5), ("calibrated", 0.7), ("calibrated", 0.5), ("distilled", 0.5)),
    ]
    dense, plain, calibrated = rows[0], rows[2], rows[4]
    assert dense["params"] == num_params(small_task().model)
    assert plain["params"] <= 0.5 * dense["params"]
    assert calibrated["score"] > 80 > 60 > plain["score"] - dense["score"]
    assert dense["multiply_adds"] == 144 * 16 * 9 * 17 + 512


def test_a_row_at_equal_multiply_adds_has_them() -> None:
    bench = Bench(small_task())
    model = bench.at_multiply_adds(0.6)
    assert 0.3 * bench.dense_multiply_adds < bench.task.multiply_adds(model) <= 0.6 * bench.dense_multiply_adds


@pytest.mark.parametrize("peer", [peers.svd_llm, peers.tucker, peers.pruned])
def test_a_peer_reaches_the_size(peer: Callable[[nn.Module, Bench, float], nn.Module]) -> None:
    try:
        packages.file("peers")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    bench = Bench(small_task())
    model = peer(copy.deepcopy(bench.task.model), bench, 0.6)
    image = bench.task.test[0][:2]
    assert model(image).shape == (2, 2)
    if peer is peers.pruned:
        assert multiply_adds(model, (image,)) <= 0.6 * multiply_adds(bench.task.model, (image,))
    else:
        assert num_params(model) <= 0.6 * bench.dense_params


def test_the_page_says_which_targets_are_met() -> None:
    def row(method: str, keep: float, score: float) -> dict[str, Any]:
        sizes = {"params": 100 * keep, "multiply_adds": 10, "time_ratio": 1.0, "output_error": 0.1}
        return {"method": method, "keep": keep, "score": score, **sizes}

    rows = [row("dense", 1.0, 90.0), row("calibrated", 0.7, 89.5), row("distilled", 0.5, 80.0)]
    failed = {"method": "auto", "keep": 0.7, "failed": "the budget cannot be met"}
    text = report.markdown(
        {"it": {"what": "halves", "metric": "accuracy", "steps": 5, "tested": 100, "rows": [*rows, failed]}}
    )
    assert "| it | 0.5: met | not run | 10.0: not met |" in text
    assert "| auto | 0.7 | the budget cannot be met |" in text
    assert "100 tested examples, of which one is 1.00 points; 5 steps of distillation" in text
