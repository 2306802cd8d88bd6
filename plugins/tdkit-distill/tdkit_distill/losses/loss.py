"""What a stage minimises: a weighted sum of terms, each computed from a student's and a teacher's forward.

A loss is a pydantic class registered under the entry-point group ``tdkit.losses``; `bind` turns its
options into a term for two given models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tdkit.errors import RegistryError
from tdkit.registry import Registry
from torch import Tensor, nn

from tdkit_distill.errors import StageError
from tdkit_distill.models.view import View

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Needs:
    """What a term reads in the student and in the teacher: outputs and attention by name, see `tapped`."""

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
    """One loss bound to two models; its parameters, if any, are learned beside the student and dropped at the end.

    A subclass implements `forward`, and `count` where its mean is over a number of positions that varies from row
    to row (labelled tokens, tokens that are not padding).
    """

    needs = Needs()

    def prepare(self, student: View, teacher: View | None, batch: Batch) -> None:
        """Called once before training with one row, so that parameters can be made for the shapes that it shows."""

    @abstractmethod
    def forward(self, student: View, teacher: View | None, batch: Batch) -> Tensor:
        """The mean loss of the batch: a scalar, or a vector of means whose sum is the loss."""

    def count(self, batch: Batch) -> Tensor:
        """Over how many positions `forward` takes its mean, or each of its means: a tensor of the shape it returns.

        The rows of an optimizer step are divided into accumulated parts and among processes. The mean of a part is
        weighted by its count over the count of the whole step, so that loss and gradients are those of one part
        with all rows. The count must therefore be a sum over rows. It is asked for once `prepare` was called, of
        batches on the CPU.

        Returns:
            The number of rows, unless overridden: right where all rows have equally many positions.
        """
        return torch.tensor(float(row_count(batch)))


def row_count(batch: Batch) -> int:
    """How many rows a batch has."""
    return len(next(iter(batch.values())))


class Loss(BaseModel, ABC):
    """The options of one kind of loss.

    Attributes:
        weight: factor of the term in the sum.
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
    """The teacher, or a `StageError` that names the loss which needs one."""
    if teacher is None:
        raise StageError(f"{place} compares with a teacher, and there is none: pass teacher=, or use cross_entropy")
    return teacher
