"""Losses on module outputs: hidden states, embedding output, feed-forward output."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit_distill.errors import StageError
from tdkit_distill.losses.averages import has_positions, mean_over_positions, position_count, working
from tdkit_distill.losses.loss import Batch, Loss, Needs, Term, need_teacher
from tdkit_distill.models.layer_maps import EMBEDDING, FEED_FORWARD, Layers, Pairs, first_existing, map_layers, matching
from tdkit_distill.models.view import View


class Features(Loss):
    """Distance of paired module outputs, summed over the pairs.

    Args:
        distance: ``mse``, or ``cosine`` for 1 - cosine similarity over the last dimension.
        reduce: ``sum`` over the pairs as the papers do, or their ``mean``.
        project: where widths differ, learn a linear map from the student's width to the teacher's; an
            error otherwise.
    """

    distance: Literal["mse", "cosine"] = "mse"
    reduce: Literal["sum", "mean"] = "sum"
    project: bool = True


class Hidden(Features):
    """Hidden states after each layer. Source: Romero et al., FitNets (2015), for the projection.

    Args:
        layers: see `map_layers`.
    """

    layers: Layers = "all"

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        teacher = need_teacher(teacher, place)
        return FeatureTerm(self, map_layers(student, teacher, self.layers, place=place), place)


class FeedForward(Features):
    """Outputs of the feed-forward parts. Source: Edalati et al., KnGPT2 (2021); KroneckerBERT (2021).

    Args:
        layers: see `map_layers`; ``all`` looks for the usual names inside each layer.
    """

    layers: Layers = "all"

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        teacher = need_teacher(teacher, place)
        return FeatureTerm(self, map_layers(student, teacher, self.layers, inside=FEED_FORWARD, place=place), place)


class Embedding(Features):
    """Output of the embedding layer. Source: Tahaei et al., KroneckerBERT (2021); Edalati et al. (2021).

    Args:
        module: its name or pattern; None finds the usual ones.
    """

    module: str | None = None

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        teacher = need_teacher(teacher, place)
        pair = self._name(student, f"{place}: student"), self._name(teacher, f"{place}: teacher")
        return FeatureTerm(self, (pair,), place)

    def _name(self, model: nn.Module, place: str) -> str:
        return matching(model, self.module, place)[0] if self.module else first_existing(model, EMBEDDING, place)


class FeatureTerm(Term):
    """The distance of each pair of outputs, through a projection where the widths differ."""

    def __init__(self, options: Features, pairs: Pairs, place: str) -> None:
        super().__init__()
        self.options = options
        self.pairs = pairs
        self.place = place
        self.needs = Needs(
            student_outputs=tuple(mine for mine, _ in pairs), teacher_outputs=tuple(theirs for _, theirs in pairs)
        )
        self.projections = nn.ModuleDict()
        self.masked: tuple[bool, ...] = ()

    def prepare(self, student: View, teacher: View | None, batch: Batch) -> None:
        assert teacher is not None
        self.masked = tuple(has_positions(student.outputs[mine], batch) for mine, _ in self.pairs)
        for number, (mine, theirs) in enumerate(self.pairs):
            wide, narrow = teacher.outputs[theirs], student.outputs[mine]
            if wide.shape[-1] == narrow.shape[-1]:
                continue
            if not self.options.project:
                raise StageError(
                    f"{self.place}: '{mine}' is {narrow.shape[-1]} wide and '{theirs}' {wide.shape[-1]}: "
                    "set project: true to learn a map between them"
                )
            self.projections[str(number)] = nn.Linear(
                narrow.shape[-1], wide.shape[-1], bias=False, device=narrow.device, dtype=working(narrow[:0]).dtype
            )

    def forward(self, student: View, teacher: View | None, batch: Batch) -> Tensor:
        assert teacher is not None
        terms = []
        for number, (mine, theirs) in enumerate(self.pairs):
            found, target = working(student.outputs[mine]), working(teacher.outputs[theirs])
            if str(number) in self.projections:
                found = working(self.projections[str(number)](found))
            terms.append(self._distance(found, target, batch))
        stacked = torch.stack(terms)
        return stacked if self.options.reduce == "sum" else stacked / len(stacked)

    def count(self, batch: Batch) -> Tensor:
        return torch.stack([position_count(batch, masked) for masked in self.masked])

    def _distance(self, found: Tensor, target: Tensor, batch: Batch) -> Tensor:
        if self.options.distance == "mse":
            return mean_over_positions((found - target).square(), batch)
        return mean_over_positions((1 - F.cosine_similarity(found, target, dim=-1)).unsqueeze(-1), batch)
