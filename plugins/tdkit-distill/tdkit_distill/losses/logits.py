"""Losses on logits: cross-entropy with the labels, divergence from the teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from tdkit_distill.data.examples import IGNORED, labels_of
from tdkit_distill.errors import CacheError, StageError
from tdkit_distill.losses.averages import position_count, valid_positions
from tdkit_distill.losses.chunked import Divergence, cross_entropy, divergence
from tdkit_distill.losses.loss import Batch, Loss, Needs, Term
from tdkit_distill.models.view import TopLogits, View


class CrossEntropy(Loss):
    """Supervised loss: the mean of -log softmax(student)[label] over labelled positions.

    A batch's labels stand beside the logits that predict them: next tokens for causal windows, the
    hidden words of a masked text, one class per row for a classifier, one per pixel for a segmentation. -100 means no
    label.
    """

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        return _CrossEntropyTerm(place)


class _CrossEntropyTerm(Term):
    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def prepare(self, student: View, teacher: View | None, batch: Batch) -> None:
        logits, labels = _logits(student, self.place), _labels(batch, self.place)
        if logits.shape[:-1].numel() != len(labels):
            raise StageError(
                f"{self.place}: one row has {len(labels)} labels, and logits of shape {tuple(logits.shape[1:])} with "
                "the classes last: give one label for each row of logits"
            )

    def forward(self, student: View, teacher: View | None, batch: Batch) -> Tensor:
        return cross_entropy(_logits(student, self.place).flatten(0, -2), _labels(batch, self.place))

    def count(self, batch: Batch) -> Tensor:
        return _labelled(_labels(batch, self.place)).sum().float()


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
        self.masked = False

    def prepare(self, student: View, teacher: View | None, batch: Batch) -> None:
        logits = _logits(student, self.place)
        theirs = None if teacher is None else teacher.logits
        if isinstance(theirs, Tensor) and theirs.shape != logits.shape:
            raise StageError(
                f"{self.place}: the student has logits of shape {tuple(logits.shape)} for one row, and the teacher "
                f"{tuple(theirs.shape)}: they must be of the same shape"
            )
        self.masked = self._mask(batch, logits.numel() // logits.shape[-1]) is not None

    def count(self, batch: Batch) -> Tensor:
        if self.options.where == "labels":
            return _labelled(_labels(batch, self.place)).sum().float()
        return position_count(batch, self.masked)

    def forward(self, student: View, teacher: View | None, batch: Batch) -> Tensor:
        mine = _logits(student, self.place).flatten(0, -2)
        if teacher is None or teacher.logits is None:
            raise StageError(f"{self.place}: the teacher returns no logits")
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
        """Which of the rows are compared; None for all."""
        if self.options.where == "labels":
            return _labelled(_labels(batch, self.place))
        return self._mask(batch, rows)

    def _mask(self, batch: Batch, rows: int) -> Tensor | None:
        """The attention mask (rows,) where there is a row of logits for each of its positions."""
        mask = valid_positions(batch)
        return mask.flatten() if mask is not None and mask.numel() == rows else None


def _logits(student: View, place: str) -> Tensor:
    if not isinstance(student.logits, Tensor) or student.logits.ndim < 2:
        raise StageError(
            f"{place}: the student returns no logits (rows, classes): use the loss 'output' for other tensors"
        )
    return student.logits


def _labels(batch: Batch, place: str) -> Tensor:
    labels = labels_of(batch)
    if labels is None:
        raise StageError(f"{place}: the batches have no labels: add a column of that name, or use another loss")
    if labels.is_floating_point():
        raise StageError(
            f"{place}: the labels are {labels.dtype}, and classes are integers: convert them, or use another loss"
        )
    return labels.flatten()


def _labelled(labels: Tensor) -> Tensor:
    return labels != IGNORED
