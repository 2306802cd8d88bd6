"""A loss of another package: registered by an entry point's class, weighted in parts by what it counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_models import bert, uneven
from torch import Tensor, nn

from tdkit_distill import Loss, Table, Term, distill
from tdkit_distill.errors import StageError
from tdkit_distill.losses.loss import losses


class Evenness(Loss):
    """The mean entropy of a classifier's answers over the rows, or over those of one class."""

    only: int | None = None
    vector: bool = False

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        return EveryRow(self) if self.only is None else SomeRows(self)


class EveryRow(Term):
    def __init__(self, options: Evenness) -> None:
        super().__init__()
        self.options = options

    def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        p = student.logits[self.chosen(batch)].softmax(-1)
        return -(p * p.log()).sum(-1).sum() / max(len(p), 1)

    def chosen(self, batch: Any) -> Tensor:
        return torch.ones_like(batch["labels"], dtype=torch.bool)


class SomeRows(EveryRow):
    def chosen(self, batch: Any) -> Tensor:
        found: Tensor = batch["labels"] == self.options.only
        return found

    def count(self, batch: Any) -> Tensor:
        total = self.chosen(batch).sum()
        return total.unsqueeze(0) if self.options.vector else total


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses._loaded, "evenness", Evenness)


def run(options: Any, parts: int) -> float:
    columns = {**uneven(), "labels": (torch.arange(16) > 5).long()}
    stage = {"losses": {"evenness": options}, "steps": 1, "batch_size": 16, "accumulation": parts}
    student = bert(seed=1)
    with torch.no_grad():
        student.classifier.weight *= 30  # answers of unlike entropy
    loss: float = distill(student, None, stage, Table(columns), running={"device": "cpu"}).history[0]["loss"]
    return loss


@pytest.mark.parametrize("options", [{}, {"only": 0}, {"only": 1}])
def test_parts_are_weighted_by_what_a_term_counts(options: Any) -> None:
    assert run(options, 8) == pytest.approx(run(options, 1), abs=1e-6)


def test_means_and_counts_of_unlike_shapes() -> None:
    with pytest.raises(StageError, match=r"SomeRows returns \(\) from forward and \(1,\) from count: both must be"):
        run({"only": 1, "vector": True}, 2)
