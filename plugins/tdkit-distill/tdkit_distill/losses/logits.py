"""Losses on logits: cross-entropy with the labels, divergence from the teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from tdkit_distill.data.examples import IGNORED
from tdkit_distill.errors import CacheError, StageError
from tdkit_distill.losses.averages import valid_rows
from tdkit_distill.losses.chunked import Divergence, cross_entropy, divergence
from tdkit_distill.losses.loss import Batch, Loss, Needs, Term
from tdkit_distill.models.view import TopLogits, View


class CrossEntropy(Loss):
    """Supervised loss: the mean of -log softmax(student)[label] over labelled positions.

    A batch's ``labels`` stand beside the logits that predict them: next tokens for causal windows, the
    hidden words of a masked text, one class per row for a classifier. -100 means no label.
    """

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        return _CrossEntropyTerm()


class _CrossEntropyTerm(Term):
    def forward(self, student: View, teacher: View | None, batch: Batch) -> Tensor:
        if not isinstance(student.logits, Tensor):
            raise StageError("cross_entropy: the student returns no logits")
        if "labels" not in batch:
            raise StageError("cross_entropy: the batches have no labels")
        return cross_entropy(student.logits.flatten(0, -2), batch["labels"].flatten())


class Logits(Loss):
    """Divergence of the student's and the teacher's next-token (or class) distributions.

    Args:
        kind: ``forward_kl``, ``reverse_kl``, ``jensen_shannon``, or ``mse`` of the raw logits.
        temperature: both are divided by it; the loss is multiplied by its square.
        top_k: keep the teacher's k most likely tokens and put all others together as one outcome.
        where: every position that is not padding, or only the labelled ones.
    """

    kind: Divergence = "forward_kl"
    temperature: float = Field(default=1.0, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    where: Literal["all", "labels"] = "all"

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        return _LogitsTerm(self, place)


class _LogitsTerm(Term):
    needs = Needs(teacher_logits=True)

    def __init__(self, options: Logits, place: str) -> None:
        super().__init__()
        self.options = options
        self.place = place

    def forward(self, student: View, teacher: View | None, batch: Batch) -> Tensor:
        if not isinstance(student.logits, Tensor) or teacher is None or teacher.logits is None:
            raise StageError(f"{self.place}: student and teacher must both return logits")
        mine = student.logits.flatten(0, -2)
        theirs = teacher.logits
        if isinstance(theirs, Tensor):
            theirs = theirs.flatten(0, -2)
        else:
            self._check_cached(theirs)
        keep = self._positions(batch, len(mine))
        if keep is not None:
            mine = mine[keep]
            theirs = theirs[keep] if isinstance(theirs, Tensor) else theirs.select(keep)
        options = self.options
        return divergence(mine, theirs, kind=options.kind, temperature=options.temperature, top_k=options.top_k)

    def _check_cached(self, cached: TopLogits) -> None:
        if self.options.kind != "mse" and cached.temperature != self.options.temperature:
            raise CacheError(
                f"{self.place}: temperature {self.options.temperature:g}, but the cache was normalised at "
                f"{cached.temperature:g}: build the cache with that temperature"
            )
        if self.options.top_k is not None and self.options.top_k != cached.indices.shape[-1]:
            raise CacheError(
                f"{self.place}: top_k={self.options.top_k}, but the cache holds {cached.indices.shape[-1]} per position"
            )

    def _positions(self, batch: Batch, rows: int) -> Tensor | None:
        if self.options.where == "labels":
            return batch["labels"].flatten() != IGNORED
        mask = valid_rows(batch)
        return mask.flatten() if mask is not None and mask.numel() == rows else None
