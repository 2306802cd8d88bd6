"""Losses on attention: distributions by KL, scores before the softmax by squared error."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from tdkit_distill.errors import StageError
from tdkit_distill.losses.averages import has_positions, mean_over_positions, position_count, valid_positions, working
from tdkit_distill.losses.loss import Batch, Loss, Needs, Term, need_teacher
from tdkit_distill.models.layer_maps import ATTENTION, Layers, Pairs, map_layers
from tdkit_distill.models.taps import AttentionRecord
from tdkit_distill.models.view import View


class AttentionLoss(Loss):
    """Distance of paired attention layers.

    Args:
        layers: attention modules, see `map_layers`; ``all`` looks for the usual names inside each layer.
        reduce: ``sum`` over the pairs as the papers do, or their ``mean``.
    """

    layers: Layers = "all"
    reduce: Literal["sum", "mean"] = "sum"

    def pairs(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Pairs:
        """The attention modules to compare."""
        return map_layers(student, need_teacher(teacher, place), self.layers, inside=ATTENTION, place=place)


class Attention(AttentionLoss):
    """KL(teacher || student) of the attention distributions, mean over heads and queries.

    Source: Edalati et al., KnGPT2 (2021).
    """

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        return DistributionTerm(self, self.pairs(student, teacher, place), place)


class AttentionScores(AttentionLoss):
    """Mean squared difference of the scaled scores before the softmax, over the keys each query may see.

    The mean is taken in each row of the batch, and over the rows weighted by how many of their tokens are not padding.

    Sources: Tahaei et al., KroneckerBERT (2021); Jiao et al., TinyBERT (2020), equation 7.
    """

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        return ScoreTerm(self, self.pairs(student, teacher, place), place)


class AttentionTerm(Term):
    """A sum or mean over paired attention layers."""

    def __init__(self, options: AttentionLoss, pairs: Pairs, place: str) -> None:
        super().__init__()
        self.options = options
        self.pairs = pairs
        self.place = place
        self.masked: tuple[bool, ...] = ()
        self.needs = Needs(
            student_attention=tuple(mine for mine, _ in pairs), teacher_attention=tuple(theirs for _, theirs in pairs)
        )

    def prepare(self, student: View, teacher: View | None, batch: Batch) -> None:
        assert teacher is not None
        for mine, theirs in self.pairs:
            for name, view in ((mine, student), (theirs, teacher)):
                if name not in view.attention:
                    raise StageError(
                        f"{self.place}: '{name}' computes no attention itself: name the module that does, such as its "
                        "child"
                    )
            here, there = student.attention[mine].scores.shape, teacher.attention[theirs].scores.shape
            if here != there:
                raise StageError(
                    f"{self.place}: '{mine}' has {here[1]} heads and '{theirs}' {there[1]}: attention can be compared "
                    "head by head only; use another loss or other layers"
                )
        self.masked = tuple(
            has_positions(student.attention[mine].scores.transpose(1, 2), batch) for mine, _ in self.pairs
        )

    def forward(self, student: View, teacher: View | None, batch: Batch) -> Tensor:
        assert teacher is not None
        terms = [
            self._distance(student.attention[mine], teacher.attention[theirs], batch) for mine, theirs in self.pairs
        ]
        stacked = torch.stack(terms)
        return stacked if self.options.reduce == "sum" else stacked / len(stacked)

    def count(self, batch: Batch) -> Tensor:
        return torch.stack([position_count(batch, masked) for masked in self.masked])

    @abstractmethod
    def _distance(self, student: AttentionRecord, teacher: AttentionRecord, batch: Batch) -> Tensor:
        """The distance of one pair of layers, a scalar."""


class DistributionTerm(AttentionTerm):
    """KL of attention distributions."""

    def _distance(self, student: AttentionRecord, teacher: AttentionRecord, batch: Batch) -> Tensor:
        log_s, log_t = _log_probabilities(student), _log_probabilities(teacher)
        p = log_t.exp()
        rows = torch.where(p > 0, p * (log_t - log_s), torch.zeros_like(p)).sum(-1)  # (batch, heads, queries)
        return mean_over_positions(rows.transpose(1, 2), batch)


class ScoreTerm(AttentionTerm):
    """Squared error of attention scores."""

    def prepare(self, student: View, teacher: View | None, batch: Batch) -> None:
        super().prepare(student, teacher, batch)
        assert teacher is not None
        for mine, theirs in self.pairs:
            for name, record in ((mine, student.attention[mine]), (theirs, teacher.attention[theirs])):
                if record.are_probabilities:
                    raise StageError(
                        f"{self.place}: '{name}' shows its attention after the softmax only: use the attention loss"
                    )

    def _distance(self, student: AttentionRecord, teacher: AttentionRecord, batch: Batch) -> Tensor:
        squares = (working(student.scores) - working(teacher.scores)).square()
        seen = torch.ones_like(squares, dtype=torch.bool)
        if teacher.allowed is not None:
            seen = seen & teacher.allowed
        mask = valid_positions(batch)
        weights = squares.new_ones(len(squares))
        if mask is not None and has_positions(squares.transpose(1, 2), batch):
            seen = seen & mask[:, None, :, None]
            weights = mask.sum(-1).to(squares.dtype)
        rows = squares.masked_fill(~seen, 0.0).sum((1, 2, 3)) / seen.sum((1, 2, 3)).clamp(min=1)
        return (rows * weights).sum() / weights.sum().clamp(min=1)


def _log_probabilities(record: AttentionRecord) -> Tensor:
    scores = working(record.scores)
    if record.are_probabilities:
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
    if record.allowed is not None:
        scores = scores.masked_fill(~record.allowed, torch.finfo(scores.dtype).min)
    return torch.log_softmax(scores, dim=-1)
