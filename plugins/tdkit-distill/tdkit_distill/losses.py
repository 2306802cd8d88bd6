"""What a stage minimises: named, weighted terms, each made from a student's and a teacher's forward.

A loss is a pydantic class registered under the entry-point group ``tdkit.losses``; `bind` turns its
options into a term for two given models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tdkit.errors import RegistryError
from tdkit.registry import Registry
from torch import Tensor, nn

from tdkit_distill.chunked import IGNORED, Divergence, TopLogits, cross_entropy, divergence
from tdkit_distill.errors import CacheError, StageError
from tdkit_distill.taps import AttentionRecord


@dataclass
class View:
    """What one model said about a batch.

    Attributes:
        logits: (batch, ..., classes), the largest of them from a cache, or None.
        outputs, attention: what the taps saw, by module name.
    """

    logits: Tensor | TopLogits | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, AttentionRecord] = field(default_factory=dict)


Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Needs:
    """Which modules a term reads, in the student and in the teacher."""

    student_outputs: tuple[str, ...] = ()
    teacher_outputs: tuple[str, ...] = ()
    student_attention: tuple[str, ...] = ()
    teacher_attention: tuple[str, ...] = ()
    teacher_logits: bool = False

    @property
    def teacher(self) -> bool:
        """Whether a teacher is needed at all."""
        return bool(self.teacher_outputs or self.teacher_attention or self.teacher_logits)

    @property
    def inside_teacher(self) -> bool:
        """Whether more than the teacher's logits is read, which no cache holds."""
        return bool(self.teacher_outputs or self.teacher_attention)


class Term(nn.Module, ABC):
    """One loss bound to two models; its parameters, if any, are learned projections."""

    needs = Needs()

    def prepare(self, student: View, teacher: View | None) -> None:
        """See the shapes of one example before training; projections are made here."""

    @abstractmethod
    def forward(self, student: View, teacher: View | None, batch: Batch) -> Tensor:
        """The mean loss of the batch, a scalar."""


class Loss(BaseModel, ABC):
    """The options of one kind of loss.

    Attributes:
        weight: what the term counts in the sum.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(default=1.0, ge=0)

    @abstractmethod
    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        """The term for these models; `place` names the loss in errors."""


losses: Registry[type[Loss]] = Registry("tdkit.losses", "loss", {})


def read_losses(form: Mapping[str, Any]) -> dict[str, Loss]:
    """Losses from ``{name: options or weight}``; ``name@label`` lets one kind appear more than once.

    Raises:
        StageError: with every fault at once.
    """
    found: dict[str, Loss] = {}
    problems = []
    for label, options in form.items():
        if isinstance(options, Loss):
            found[label] = options
            continue
        if isinstance(options, int | float) and not isinstance(options, bool):
            options = {"weight": options}
        if not isinstance(options, Mapping | None):
            problems.append(f"{label}: give 'option: value' pairs or a weight, not {options!r}")
            continue
        try:
            found[label] = losses.get(label.partition("@")[0]).model_validate(dict(options or {}))
        except RegistryError as error:
            problems.append(str(error))
        except ValidationError as error:
            problems += [f"{label}.{'.'.join(map(str, e['loc']))}: {_message(e)}" for e in error.errors()]
    if problems:
        raise StageError("\n".join(problems))
    if not found:
        raise StageError("a stage needs at least one loss, such as {logits: 1.0}")
    return found


def _message(fault: Any) -> str:
    return "unknown option" if fault["type"] == "extra_forbidden" else f"{fault['msg']} (got {fault['input']!r})"


def need_teacher(teacher: nn.Module | None, place: str) -> nn.Module:
    """The teacher, or an error that says which loss needs one."""
    if teacher is None:
        raise StageError(f"{place} compares with a teacher, and there is none: pass teacher=, or use cross_entropy")
    return teacher


def valid_rows(batch: Batch) -> Tensor | None:
    """Which positions (batch, length) are text rather than padding; None for all."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


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


def mean_over(
    values: Tensor,  # (batch, length, ...) or (batch, ...)
    keep: Tensor | None,  # (batch, length)
) -> Tensor:
    """The mean over the positions that are kept and all trailing dimensions."""
    if keep is None or keep.shape != values.shape[: keep.ndim]:
        return values.mean()
    weights = keep.reshape(*keep.shape, *[1] * (values.ndim - keep.ndim)).to(values.dtype)
    count = weights.sum().clamp(min=1) * values[0, 0].numel()
    return (values * weights).sum() / count


def working(x: Tensor) -> Tensor:
    """At least float32, in which differences are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
