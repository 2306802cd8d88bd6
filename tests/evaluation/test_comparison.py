"""Agreement of a compressed model with the dense one."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import EvaluationError
from tdkit.evaluation import agreement
from tests.tasks import TASKS, tokens


class Table(nn.Module):
    """Returns the outputs of its table for the given indices."""

    def __init__(self, values: Tensor, wrap: Any = None) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.wrap = wrap or (lambda y: y)

    def forward(self, index: Tensor) -> Any:
        return self.wrap(self.values[index])


DENSE = torch.tensor([[3.0, 1, 0], [0, 2, 1], [0, 0, 5], [9, 0, 0]])
SMALLER = torch.tensor([[3.0, 1, 1], [0, 1, 2], [0, 0, 5], [9, 0, 0]])


def test_by_hand() -> None:
    index = torch.arange(4)
    error = float((SMALLER - DENSE).norm() / DENSE.norm())
    for batches in ([index], [index[:1], index[1:]], [(index, index)], [{"index": index}], iter([index])):
        found = agreement(Table(SMALLER), Table(DENSE), batches)
        assert found.relative_error == pytest.approx(error, rel=1e-6)
        assert found.top1 == 0.75
        assert found.predictions == 4
        assert found.to_dict() == {"relative_error": found.relative_error, "top1": 0.75, "predictions": 4}


def test_equal_models_agree_and_zero_outputs_divide_by_nothing() -> None:
    index = torch.arange(4)
    assert agreement(Table(DENSE), Table(DENSE), [index]).relative_error == 0
    assert agreement(Table(0 * DENSE), Table(0 * DENSE), [index]).relative_error == 0
    assert agreement(Table(DENSE), Table(0 * DENSE), [index]).relative_error == math.inf
    assert math.isnan(agreement(Table(DENSE * math.nan), Table(DENSE), [index]).relative_error)


def test_only_logits_have_a_largest_one() -> None:
    index = torch.arange(4)
    rows = DENSE[:, None].expand(4, 2, 3)
    wide = DENSE[:, :, None, None].expand(4, 3, 2, 2)
    logits = lambda y: SimpleNamespace(logits=y, hidden=y + 1)  # noqa: E731
    assert agreement(Table(rows), Table(rows), [index]).top1 is None  # these can be anything
    assert agreement(Table(rows, logits), Table(rows, logits), [index]).predictions == 8
    assert agreement(Table(wide, logits), Table(wide, logits), [index]).predictions == 16
    assert agreement(Table(DENSE[:, :1]), Table(DENSE[:, :1]), [index]).top1 is None
    hidden = lambda y: {"last_hidden_state": y}  # noqa: E731
    assert agreement(Table(DENSE, hidden), Table(DENSE, hidden), [index]).top1 is None


def test_an_output_of_choice() -> None:
    index = torch.arange(4)

    def both(y: Tensor) -> dict[str, Tensor]:
        return {"a": y, "b": y.square()}

    first = agreement(Table(SMALLER, both), Table(DENSE, both), [index])
    chosen = agreement(Table(SMALLER, both), Table(DENSE, both), [index], output=lambda output: output["b"])
    assert first.relative_error == pytest.approx(float((SMALLER - DENSE).norm() / DENSE.norm()), rel=1e-6)
    squares = DENSE.square()
    assert chosen.relative_error == pytest.approx(float((SMALLER.square() - squares).norm() / squares.norm()), rel=1e-6)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_compressed_models_of_many_kinds(name: str) -> None:
    model, batches = TASKS[name]()
    dense = copy.deepcopy(model)
    assert agreement(model, dense, batches).relative_error == 0
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]))
    found = agreement(model, dense, batches)
    assert 0 < found.relative_error < 10
    assert found.top1 is not None
    assert 0 <= found.top1 <= 1
    if isinstance(batches[0], dict) and name in ("vit", "resnet", "bert"):
        bare = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
        assert agreement(model, dense, bare) == found


def test_padding_is_left_out() -> None:
    model, _ = TASKS["bert"]()
    dense = copy.deepcopy(model)
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]))
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.long)
    mask[:, 7:] = 0
    padded = agreement(model, dense, [{"input_ids": ids, "attention_mask": mask}])
    short = agreement(model, dense, [{"input_ids": ids[:, :7], "attention_mask": mask[:, :7]}])
    assert padded.predictions == short.predictions == 14
    assert padded.relative_error == pytest.approx(short.relative_error, rel=1e-4)


def test_faults_are_told() -> None:
    index, model = torch.arange(4), Table(DENSE)
    with pytest.raises(EvaluationError, match=r"compares a model with itself.*copy\.deepcopy"):
        agreement(model, model, [index])
    with pytest.raises(EvaluationError, match="there are no batches"):
        agreement(Table(SMALLER), model, [])
    with pytest.raises(
        EvaluationError, match=r"batch 0: the outputs of the models have the shapes \(4, 2\) and \(4, 3\)"
    ):
        agreement(Table(DENSE[:, :2]), model, [index])
    text = Table(DENSE, lambda y: "text")
    with pytest.raises(EvaluationError, match="returns a str without a floating-point tensor to compare: give output="):
        agreement(text, Table(DENSE, text.wrap), [index])
    with pytest.raises(EvaluationError, match="batches is one tensor"):
        agreement(Table(SMALLER), model, index)


def test_both_models_come_back_as_they_were() -> None:
    model, dense = nn.Sequential(nn.Dropout(0.5)).train(), nn.Sequential(nn.Dropout(0.5), nn.Identity()).train()
    dense[1].eval()
    assert agreement(model, dense, [DENSE], device="cpu").relative_error == 0
    assert model.training
    assert model[0].training
    assert dense[0].training
    assert not dense[1].training
