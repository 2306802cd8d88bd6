"""Convolutional and recurrent students, compressed by tdkit, come closer to their teachers on rows not trained on."""

from __future__ import annotations

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tdkit
import torch
from distill_models import Convolutional, Recurrent, images, same_weights, walks
from tdkit.evaluation import agreement, score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tdkit_distill import distill
from tdkit_distill.errors import DataError, StageError

STEPS = {"steps": 60, "batch_size": 32, "optimizer": {"lr": 3e-3}}


@pytest.fixture(scope="module")
def classifier() -> Convolutional:
    """Trained by hard labels alone, without a teacher."""
    model = Convolutional()
    stage = {**STEPS, "losses": {"cross_entropy": 1}, "optimizer": {"lr": 1e-2}}
    result = distill(model, None, stage, TensorDataset(*images(512, 1)), held_out=TensorDataset(*images(64, 2)))
    assert result.history[0]["loss"] > 1.2
    assert result.held_out is not None
    assert result.held_out < 0.8
    assert result.tokens == 60 * 32, "images are counted as one token each"
    assert score(model, [images(256, 2)]) > 0.8
    return model


def compressed(model: nn.Module, kind: tdkit.Decomposition, head: str, budget: float) -> nn.Module:
    rules = [tdkit.Rule(head, keep=True), tdkit.Rule("*", kind)]
    student: nn.Module = tdkit.compress(copy.deepcopy(model), tdkit.Policy(rules, budget=budget))
    return student


@pytest.mark.parametrize(
    "losses",
    [
        {"logits": {"temperature": 2.0}},
        {"hidden": {"layers": ["stem", "body"]}},
        {"output": {"distance": "relative"}},
        {"logits": 1, "hidden": {"layers": "body", "weight": 0.5}, "output": 0.5, "cross_entropy": 0.1},
    ],
    ids=["logits", "hidden", "output", "all"],
)
@pytest.mark.parametrize("kind", [tdkit.Tucker(), tdkit.LowRank()], ids=["tucker", "low_rank"])
def test_a_convolutional_student(classifier: Convolutional, kind: tdkit.Decomposition, losses: dict[str, Any]) -> None:
    student = compressed(classifier, kind, "head", 0.5)
    held = [images(256, 2)[0]]
    before = agreement(student, classifier, held)
    result = distill(student, classifier, {**STEPS, "losses": losses}, TensorDataset(*images(512, 1)))
    after = agreement(student, classifier, held)
    assert set(result.history[0]["terms"]) == set(losses)
    assert after.relative_error < 0.75 * before.relative_error
    assert after.top1 is not None
    assert before.top1 is not None
    assert after.top1 > before.top1


@pytest.mark.parametrize(
    ("losses", "states"),
    [
        ({"output": 1}, False),
        ({"output": {"distance": "relative"}}, False),
        ({"output": {"distance": "cosine"}}, False),
        ({"output": {"tensors": ["0", "1.0", "1.1"]}}, True),
        ({"output": 1, "hidden": {"layers": "lstm"}}, True),
        ({"logits": {"kind": "mse"}}, False),
    ],
)
def test_a_recurrent_student_whose_weights_are_factorised_in_place(losses: dict[str, Any], states: bool) -> None:
    teacher = Recurrent(states)
    student: Any = compressed(teacher, tdkit.LowRank(), "project", 0.6)
    assert isinstance(student.lstm, nn.LSTM)
    start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    factors = [name for name in start if "lstm" in name and "matrix" in name]
    assert len(factors) == 8, "two factors of each of four weights"
    direction = partial(F.normalize, dim=-1) if losses.get("output") == {"distance": "cosine"} else None
    before = agreement(student, teacher, [walks(64, 2)], output=direction).relative_error
    stage = {**STEPS, "losses": losses, "trainable": "factors", "optimizer": {"lr": 1e-2}}
    distill(student, teacher, stage, walks(512, 1))
    after = agreement(student, teacher, [walks(64, 2)], output=direction).relative_error
    assert after < 0.9 * before, (before, after)
    changed = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, start[name])}
    assert changed == set(factors)


def test_a_resnet_of_transformers_on_dictionaries() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4)
    teacher = ResNetForImageClassification(config)
    pixels, labels = images(128, 1)
    data = {"pixel_values": pixels, "labels": labels}
    stage = {**STEPS, "steps": 20, "losses": {"cross_entropy": 1}}
    distill(teacher, None, stage, data)
    student = compressed(teacher, tdkit.Tucker(), "classifier.1", 0.6)
    held = [{"pixel_values": images(64, 2)[0]}]
    before = agreement(student, teacher, held).relative_error
    every = {"logits": {"temperature": 2.0}, "hidden": 1, "output": {"tensors": "logits"}, "cross_entropy": 0.1}
    result = distill(student, teacher, {**stage, "steps": 40, "losses": every}, data, held_out=data)
    assert result.held_out is not None
    assert agreement(student, teacher, held).relative_error < 0.75 * before


def test_a_killed_run_goes_on_with_the_statistics_of_its_normalisation(tmp_path: Path) -> None:
    teacher = Convolutional()
    first = compressed(teacher, tdkit.Tucker(), "head", 0.5)
    student, again = copy.deepcopy(first), copy.deepcopy(first)
    stage = {**STEPS, "steps": 6, "losses": {"hidden": {"layers": ["stem", "body"]}}}
    options: dict[str, Any] = {"folder": tmp_path, "running": {"checkpoint_every": 3, "device": "cpu"}}
    distill(student, teacher, stage, images(64, 1)[0], **options)
    assert not torch.equal(student.get_buffer("stem.1.running_mean"), first.get_buffer("stem.1.running_mean"))
    shutil.rmtree(tmp_path / "step-00000006")
    assert distill(again, teacher, stage, images(64, 1)[0], **options).resumed_at == 3
    assert same_weights(student, again)


def test_accumulated_parts_make_the_same_relative_error() -> None:
    losses = {"output": {"distance": "relative"}, "hidden": {"layers": "lstm", "distance": "relative"}}
    found = []
    for parts in (1, 4):
        stage = {"losses": losses, "steps": 1, "batch_size": 16, "accumulation": parts}
        student = compressed(Recurrent(), tdkit.LowRank(), "project", 0.4)
        found.append(distill(student, Recurrent(), stage, walks(16, 1)).history[0]["terms"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert all(value > 0 for value in found[0].values())


def test_a_teacher_in_another_dtype_gets_its_inputs_in_it() -> None:
    teacher = Convolutional()
    student = compressed(teacher, tdkit.Tucker(), "head", 0.5)
    stage = {"losses": {"output": 1}, "steps": 1}
    (entry,) = distill(student, teacher, stage, images(8, 1)[0], running={"teacher_dtype": "float64"}).history
    assert 0 < entry["loss"] < float("inf")


def test_what_cannot_be_distilled_is_told() -> None:
    x, y = images(8, 1)
    teacher = Convolutional()

    def attempt(losses: Any, data: Any = None, student: nn.Module | None = None, **options: Any) -> None:
        stage = {"losses": losses, "steps": 1}
        distill(student or Convolutional(), teacher, stage, x if data is None else data, **options)

    with pytest.raises(StageError, match="has no list of layers: give layers="):
        attempt({"hidden": 1})
    wide = Convolutional()
    wide.stem[0] = nn.Conv2d(1, 24, 3, padding=1)
    wide.stem[1], wide.body[0] = nn.BatchNorm2d(24), nn.Conv2d(24, 32, 3, padding=1)
    with pytest.raises(
        StageError,
        match=r"'stem' of the student has the shape \(1, 24, 12, 12\) for one row, and 'stem' of the teacher "
        r"\(1, 16, 12, 12\): name tensors of the same shape",
    ):
        attempt({"hidden": {"layers": "stem"}}, student=wide)
    with pytest.raises(StageError, match=r"'stem' has the shape \(1, 16, 12, 12\) .* use mse or relative"):
        attempt({"hidden": {"layers": "stem", "distance": "cosine"}})
    with pytest.raises(StageError, match="the batches have no labels"):
        attempt({"cross_entropy": 1})
    with pytest.raises(StageError, match=r"the labels are torch.float32, and classes are integers"):
        attempt({"cross_entropy": 1}, TensorDataset(x, y.float()))
    with pytest.raises(StageError, match=r"one row has 3 labels, and logits of shape \(4,\)"):
        attempt({"cross_entropy": 1}, TensorDataset(x, y[:, None].expand(8, 3)))
    with pytest.raises(StageError, match="held_out: these rows have no labels"):
        attempt({"output": 1}, held_out=x)
    with pytest.raises(DataError, match="data is a DataLoader: give a tensor, a TensorDataset"):
        attempt({"output": 1}, DataLoader(TensorDataset(x, y)))
    with pytest.raises(DataError, match=r"a batch has 3 entries, which Convolutional\.forward"):
        attempt({"output": 1}, TensorDataset(x, y, y))


class Unused(nn.Module):
    """A layer whose weight is read and which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight


def test_a_module_that_is_not_called() -> None:
    stage = {"losses": {"hidden": {"layers": "layer"}}, "steps": 1}
    with pytest.raises(StageError, match="the student does not call 'layer', whose output is compared"):
        distill(Unused(), Unused(), stage, torch.randn(8, 4))
