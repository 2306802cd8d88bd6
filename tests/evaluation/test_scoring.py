"""Accuracy, mean squared error and metrics of the user's, on batches of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import EvaluationError
from tdkit.evaluation import score
from tests.conftest import make_gpt2
from tests.tasks import TASKS, tokens


class Same(nn.Module):
    """Returns its input, and counts nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return x


LOGITS = torch.tensor([[3.0, 1, 0], [0, 2, 1], [0, 0, 5], [9, 0, 0]])


def test_accuracy_by_hand() -> None:
    y = torch.tensor([0, 2, 2, 1])
    assert score(Same(), [(LOGITS, y)]) == 0.5
    assert score(Same(), [(LOGITS[:1], y[:1]), (LOGITS[1:], y[1:])]) == 0.5  # batches of other sizes weigh as much
    assert score(Same(), [(LOGITS, torch.tensor([0, -100, -100, 1]))], "accuracy") == 0.5
    assert score(Same(), DataLoader(TensorDataset(LOGITS, y), batch_size=3)) == 0.5
    assert score(Same(), (batch for batch in [(LOGITS, y)])) == 0.5


def test_accuracy_with_classes_in_the_second_dimension() -> None:
    image = LOGITS.T.reshape(1, 3, 2, 2)
    assert score(Same(), [(image, torch.tensor([[[0, 2], [2, 1]]]))]) == 0.5


def test_mean_squared_error_by_hand() -> None:
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    expected = float((x - y).square().mean())
    assert score(Same(), [(x[:2], y[:2]), (x[2:], y[2:])], "mse") == pytest.approx(expected, rel=1e-6)


def test_a_metric_of_the_users() -> None:
    x, y = torch.randn(6, 3), torch.randn(6)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]

    def each(output: Tensor, batch: Any) -> Tensor:
        return output.sum(-1) - batch[1]

    def whole(output: Tensor, batch: Any) -> float:
        return float(each(output, batch).mean())

    expected = float((x.sum(-1) - y).mean())
    assert score(Same(), batches, each) == pytest.approx(expected, rel=1e-5)
    assert score(Same(), batches, whole) == pytest.approx(expected, rel=1e-5)  # counts as often as there are examples
    assert score(Same(), [(x, y)], lambda output, batch: output > 0) == float((x > 0).double().mean())


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"wav2vec2"}))
def test_models_of_many_kinds(name: str) -> None:
    model, batches = TASKS[name]()
    right = count = 0
    with torch.no_grad():
        for batch in batches:
            output = model(**batch).logits if isinstance(batch, dict) else model(batch[0])
            labels = batch["labels"] if isinstance(batch, dict) else batch[1]
            right += int((output.argmax(-1) == labels)[labels != -100].sum())
            count += int((labels != -100).sum())
    assert score(model, batches) == right / count


def test_next_tokens_of_a_causal_model() -> None:
    model, ids = make_gpt2(), tokens()
    with torch.no_grad():
        expected = float((model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).double().mean())
    repeats = model(ids).logits.argmax(-1)
    labels = torch.cat([ids[:, :1], repeats[:, :-1]], 1)  # right, one position later
    assert score(model, [ids]) == expected
    assert score(model, [{"input_ids": ids, "labels": ids}]) == expected
    assert score(model, [{"input_ids": ids, "labels": labels}]) == 1.0
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    with torch.no_grad():
        cut = float((model(ids).logits[:, :5].argmax(-1) == ids[:, 1:6]).double().mean())
    assert score(model, [{"input_ids": ids, "attention_mask": mask}]) == pytest.approx(cut)


@pytest.mark.parametrize(
    ("batches", "metric", "message"),
    [
        ([], "accuracy", "nothing to score: the batches are none"),
        ([(LOGITS, torch.full((4,), -100))], "accuracy", "all their labels are ignored"),
        (
            [LOGITS],
            "accuracy",
            r"batch 0: accuracy needs labels.*compare with the dense model by tdkit\.evaluation\.agr",
        ),
        ([(LOGITS, LOGITS)], "accuracy", "accuracy is for integer labels, and these are torch.float32: give 'mse'"),
        ([(LOGITS, LOGITS[:, 0])], "mse", r"batch 0: labels of shape \(4,\) do not have the shape of the output"),
        ([LOGITS], "mse", "batch 0: there are no labels: give batches .*, or give metric="),
        ([(LOGITS, LOGITS), (LOGITS,) * 3], "mse", r"batch 1: a batch has 3 entries, which Same\.forward\(x\)"),
        ([(LOGITS, torch.arange(4))], "accuracy", "label 3 is none of the 3 classes"),
        (
            [LOGITS],
            "accurracy",
            r"no metric 'accurracy'; did you mean 'accuracy'\? Known: accuracy, mse; or give metric=",
        ),
        ([LOGITS], lambda output, batch: "good", "batch 0: the metric returned a str"),
        (LOGITS, "accuracy", r"batches is one tensor, not an iterable of batches: give \[batch\]"),
    ],
)
def test_faults_are_told(batches: Any, metric: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        score(Same(), batches, metric)


def test_models_that_need_labels() -> None:
    model, batches = TASKS["bert"]()
    with pytest.raises(EvaluationError, match="accuracy needs labels, except for a causal language model"):
        score(model, [{"input_ids": batch["input_ids"]} for batch in batches])
    model, batches = TASKS["t5"]()
    with pytest.raises(EvaluationError, match="batch 0: T5ForConditionalGeneration is an encoder-decoder"):
        score(model, [{"input_ids": batch["input_ids"]} for batch in batches])


def test_the_model_comes_back_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9)).train()
    model[0].eval()
    state = torch.get_rng_state()
    places = []

    def note(output: Tensor, batch: Any) -> Tensor:
        places.append((model[1].training, output.requires_grad, torch.rand(1)))
        return output

    first = score(model, [LOGITS], note, device="cpu")
    assert score(model, [LOGITS], note) == first
    assert [place[:2] for place in places] == [(False, False)] * 2
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[0].weight.is_inference()
    with pytest.raises(RuntimeError):
        score(model, [torch.randn(2, 7)])
    assert model.training


def test_inside_inference_mode_and_for_a_compressed_model() -> None:
    model, batches = TASKS["vit"]()
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]))
    outside = score(model, batches)
    with torch.inference_mode():
        assert score(model, batches) == outside
    assert score(tdkit.prepare(model), batches) == outside
