"""Any model on batches: the figures are those of `score` and `agreement`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import EvaluationError
from tdkit.evaluation import Report, agreement, measure_batches, report, score
from tdkit.evaluation.batches import quality
from tdkit.sources import Source

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


@pytest.fixture
def smaller(dense: nn.Module) -> Source:
    model = tdkit.compress(copy.deepcopy(dense), Policy([Rule("*", LowRank(rank=2))]))
    return Source("smaller", model, None)


@pytest.fixture
def batches() -> Batches:
    return [(torch.randn(8, 16), torch.randint(5, (8,))) for _ in range(3)]


def test_figures_are_those_of_score_and_agreement(dense: nn.Module, smaller: Source, batches: Batches) -> None:
    found = measure_batches(smaller, batches, "ours", dense=dense)
    figures = {name: figure.value for name, figure in found.figures.items()}
    same = agreement(smaller.model, dense, batches)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (smaller.model, dense)]
    assert figures == {
        "accuracy": score(smaller.model, batches),
        "dense accuracy": score(dense, batches),
        "agreement": same.top1,
        "relative error": same.relative_error,
        "ratio": sizes[0] / sizes[1],
    }
    assert (found.tokens, found.protocol.windows, found.dataset) == (24, 3, None)


def test_the_metric_is_that_of_the_labels(smaller: Source, batches: Batches) -> None:
    targets = [(x, torch.randn(8, 5)) for x, _ in batches]
    assert list(measure_batches(smaller, batches, "ours").figures) == ["accuracy"]
    found = measure_batches(smaller, targets, "ours").figures
    assert list(found) == ["mse"]
    assert found["mse"].value == score(smaller.model, targets, "mse")


def test_without_labels_the_dense_model_is_what_is_compared_with(
    dense: nn.Module, smaller: Source, batches: Batches
) -> None:
    inputs = [x for x, _ in batches]
    assert list(measure_batches(smaller, inputs, "ours", dense=dense).figures) == [
        "agreement",
        "relative error",
        "ratio",
    ]
    with pytest.raises(EvaluationError, match="ours holds no labels to measure by"):
        measure_batches(smaller, inputs, "ours")


def test_quality_is_by_labels_or_by_agreement(dense: nn.Module, smaller: Source, batches: Batches) -> None:
    assert quality(smaller, batches, "ours", dense) == {"accuracy": score(smaller.model, batches)}
    inputs = [x for x, _ in batches]
    found = agreement(smaller.model, dense, inputs)
    assert quality(smaller, inputs, "ours", dense) == {
        "agreement": found.top1,
        "relative error": found.relative_error,
    }
    assert quality(Source("dense", dense, None), inputs, "ours", dense) == {"agreement": 1, "relative error": 0}
    with pytest.raises(EvaluationError, match="ours holds no batches"):
        quality(smaller, [], "ours", dense)
    with pytest.raises(EvaluationError, match="batch 0"):
        quality(smaller, [(x, x, x) for x in inputs], "ours", dense)


def test_data_is_known_by_its_digest(smaller: Source, batches: Batches, tmp_path: Path) -> None:
    first, again = (measure_batches(smaller, batches, "ours") for _ in range(2))
    other = measure_batches(smaller, [(x, (y + 1) % 5) for x, y in batches], "ours")
    assert first.tokens_sha256 == again.tokens_sha256 != other.tokens_sha256
    file = tmp_path / "data.safetensors"
    save_file({"inputs": batches[0][0], "labels": batches[0][1]}, file)
    of_file = measure_batches(smaller, batches, str(file))
    assert of_file.dataset is not None
    assert of_file.dataset.name == str(file)
    made = report(smaller, [of_file])
    made.save(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == made
