"""Losses on tensors: hidden states, embedding output, feed-forward output, what the models return."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit_distill.errors import StageError
from tdkit_distill.losses.averages import has_positions, mean_over_positions, position_count, valid_positions, working
from tdkit_distill.losses.loss import Batch, Loss, Needs, Term, need_teacher, row_count
from tdkit_distill.models.layer_maps import EMBEDDING, FEED_FORWARD, Layers, Pairs, first_existing, map_layers, matching
from tdkit_distill.models.view import View


class Distance(Loss):
    """Distance of paired tensors of one shape, summed over the pairs.

    Args:
        distance: ``mse``, the mean squared difference of the elements; ``relative``, the mean over the rows of
            ||student - teacher||^2 / ||teacher||^2, infinite or NaN for a row of zeros; or ``cosine``, the mean of 1 -
            cosine similarity over the last dimension of tensors of at most three dimensions.
        reduce: ``sum`` over the pairs as the papers do, or their ``mean``.
    """

    distance: Literal["mse", "relative", "cosine"] = "mse"
    reduce: Literal["sum", "mean"] = "sum"


class Features(Distance):
    """Distance of paired module outputs.

    Args:
        project: where the last dimensions of tensors of at most three dimensions differ, learn a linear map from the
            student's width to the teacher's; an error otherwise.
    """

    project: bool = True


class Output(Distance):
    """Distance of what the models return: embeddings, values, images, several tensors.

    Args:
        tensors: names in the output, such as ``last_hidden_state``, and numbers in tuples, joined by dots: ``1.0`` is
            the first tensor of the second entry. When None, the tensor that holds the predictions: the output itself,
            its ``logits``, its first tensor when it is a tuple, or its only one.
    """

    tensors: str | list[str] | None = None

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        need_teacher(teacher, place)
        paths = [self.tensors or ""] if isinstance(self.tensors, str | None) else self.tensors
        if not paths:
            raise StageError(f"{place}: tensors is empty: name at least one, or leave it out")
        return FeatureTerm(self, tuple((f":{path}", f":{path}") for path in paths), place)


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

    def __init__(self, options: Distance, pairs: Pairs, place: str) -> None:
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
        for number, (mine, theirs) in enumerate(self.pairs):
            narrow, wide = self._found(student, mine, "student"), self._found(teacher, theirs, "teacher")
            self._check_distance(mine, wide, batch)
            if wide.shape == narrow.shape:
                continue
            if wide.shape[:-1] != narrow.shape[:-1] or wide.ndim > 3 or not isinstance(self.options, Features):
                raise StageError(
                    f"{self.place}: {_shown(mine)} of the student has the shape {tuple(narrow.shape)} for one row, and "
                    f"{_shown(theirs)} of the teacher {tuple(wide.shape)}: name tensors of the same shape"
                )
            if not self.options.project:
                raise StageError(
                    f"{self.place}: '{mine}' is {narrow.shape[-1]} wide and '{theirs}' {wide.shape[-1]}: "
                    "set project: true to learn a map between them"
                )
            self.projections[str(number)] = nn.Linear(
                narrow.shape[-1], wide.shape[-1], bias=False, device=narrow.device, dtype=working(narrow[:0]).dtype
            )
        self.masked = tuple(has_positions(student.outputs[mine], batch) for mine, _ in self.pairs)

    def _found(self, view: View, name: str, model: str) -> Tensor:
        if name not in view.outputs:
            raise StageError(
                f"{self.place}: the {model} does not call {_shown(name)}, whose output is compared: name a module that "
                "its forward calls"
            )
        found = view.outputs[name]
        if not found.is_floating_point():
            raise StageError(f"{self.place}: {_shown(name)} is {found.dtype}: only floating-point tensors are compared")
        return found

    def _check_distance(self, name: str, target: Tensor, batch: Batch) -> None:
        shape, kind = tuple(target.shape), self.options.distance
        if kind == "cosine" and not 2 <= target.ndim <= 3:
            raise StageError(
                f"{self.place}: {_shown(name)} has the shape {shape} for one row, of which the dimension for cosine is "
                "not known: use mse or relative"
            )
        if kind == "relative":
            self._check_rows(name, target, batch)

    def _check_rows(self, name: str, target: Tensor, batch: Batch) -> None:
        if target.ndim == 0 or len(target) != row_count(batch):
            raise StageError(
                f"{self.place}: {_shown(name)} has the shape {tuple(target.shape)} for a batch of {row_count(batch)} "
                "rows, over the first dimension of which relative is a mean: use mse"
            )

    def forward(self, student: View, teacher: View | None, batch: Batch) -> Tensor:
        assert teacher is not None
        terms = []
        for number, (mine, theirs) in enumerate(self.pairs):
            found, target = working(student.outputs[mine]), working(teacher.outputs[theirs])
            if str(number) in self.projections:
                found = working(self.projections[str(number)](found))
            if self.options.distance == "relative":
                self._check_rows(mine, target, batch)
            terms.append(self._distance(found, target, batch))
        stacked = torch.stack(terms)
        return stacked if self.options.reduce == "sum" else stacked / len(stacked)

    def count(self, batch: Batch) -> Tensor:
        return torch.stack([position_count(batch, masked) for masked in self.masked])

    def _distance(self, found: Tensor, target: Tensor, batch: Batch) -> Tensor:
        if found.shape != target.shape:
            raise StageError(
                f"{self.place}: the student has a tensor of shape {tuple(found.shape)} where the teacher has "
                f"{tuple(target.shape)}"
            )
        if self.options.distance == "mse":
            return mean_over_positions((found - target).square(), batch)
        if self.options.distance == "relative":
            return _relative(found, target, batch)
        return mean_over_positions((1 - F.cosine_similarity(found, target, dim=-1)).unsqueeze(-1), batch)


def _relative(
    found: Tensor,  # (rows, ...)
    target: Tensor,  # (rows, ...)
    batch: Batch,
) -> Tensor:
    """The mean over the rows of ||found - target||^2 / ||target||^2, weighted by their tokens that are not padding."""
    mask = valid_positions(batch)
    if mask is None or not has_positions(target, batch):
        return (_squares(found - target) / _squares(target)).mean()
    seen = mask.reshape(*mask.shape, *[1] * (target.ndim - 2))
    tokens = mask.sum(-1).to(target.dtype)
    norms = torch.where(tokens > 0, _squares(target * seen), 1)  # the weight of a row of padding is 0
    return (_squares((found - target) * seen) / norms * tokens).sum() / tokens.sum().clamp(min=1)


def _squares(x: Tensor) -> Tensor:
    """The sum of the squares of each row, (rows,)."""
    return x.reshape(len(x), -1).square().sum(-1)


def _shown(name: str) -> str:
    """A tapped tensor in an error."""
    _, picks, path = name.partition(":")
    if not picks:
        return f"'{name}'"
    return f"'{path}' of the output" if path else "the output"
