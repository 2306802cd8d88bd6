"""The student together with its loss terms as one module, so that wrappers (DDP, autocast) see one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdkit_distill.data.examples import Examples, labels_of
from tdkit_distill.errors import CacheError, StageError, VocabularyError
from tdkit_distill.loop.stages import Running, Stage, trainable_names
from tdkit_distill.losses.chunked import cross_entropy
from tdkit_distill.losses.loss import Loss, Needs, Term
from tdkit_distill.models.calls import Call, logits_of, to_device
from tdkit_distill.models.taps import Record
from tdkit_distill.models.view import View
from tdkit_distill.teachers.cache import CachedTeacher
from tdkit_distill.teachers.live import Teacher

STUDENT = "student."


class Trainee(nn.Module):
    """Runs the student on a batch, and every loss term on what it returned; the terms are not weighted."""

    def __init__(self, student: nn.Module, terms: list[Term], record: Record, call: Call) -> None:
        super().__init__()
        self.student = student
        self.terms = nn.ModuleList(terms)
        self._record = record
        self._call = call

    def view(self, batch: Mapping[str, Tensor]) -> View:
        """What the student returns for a batch."""
        self._record.clear()
        self._record.open = True
        output = self._call(self.student, batch)
        self._record.open = False
        return View(logits_of(output), dict(self._record.outputs), dict(self._record.attention))

    def forward(
        self,
        batch: Mapping[str, Tensor],
        teacher: View | None,
        shares: Sequence[Tensor] | None = None,
        held_out: bool = False,
    ) -> Tensor:
        """What the batch adds to each term of an optimizer step, (terms,).

        Args:
            shares: for each term, the batch's share of the positions of the step; 1 when None.
            held_out: return the mean cross-entropy of the batch instead, a scalar.
        """
        if held_out:
            return self._cross_entropy(batch)
        view = self.view(batch)
        self._record.clear()
        means = [term(view, teacher, batch) for term in self.terms]
        if shares is not None:
            means = [_weighted(*pair) for pair in zip(self.terms, means, shares, strict=True)]
        return torch.stack([mean.sum() for mean in means])

    def _cross_entropy(self, batch: Mapping[str, Tensor]) -> Tensor:
        self._record.open = False
        logits = logits_of(self._call(self.student, batch))
        labels = labels_of(batch)
        if logits is None or labels is None:
            raise StageError("held-out rows can only be measured by labels, on a student that returns logits")
        return cross_entropy(logits.flatten(0, -2), labels.flatten())


def _weighted(term: nn.Module, mean: Tensor, share: Tensor) -> Tensor:
    if mean.shape != share.shape:
        raise StageError(
            f"{type(term).__name__} returns {tuple(mean.shape)} from forward and {tuple(share.shape)} from count: both "
            "must be a scalar, or a vector with one entry for each mean"
        )
    return mean * share


@dataclass(frozen=True)
class BoundTerms:
    """The losses of a stage, bound to the two models."""

    labels: tuple[str, ...]
    weights: tuple[float, ...]
    terms: tuple[Term, ...]

    def gather(self, entry: str) -> tuple[str, ...]:
        """The modules that the terms name in one field of `Needs`, each once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in getattr(term.needs, entry)))

    def shares(self, parts: Sequence[Mapping[str, Tensor]], whole: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """For each part of a step and each term, the part's share of the positions that the term counts in `whole`.

        The shares of all parts of a step add up to 1, or to 0 where a term counts nothing.
        """
        totals = [term.count(whole).double() for term in self.terms]
        return [
            [
                torch.where(total > 0, term.count(part).double() / total, 0.0).float()
                for term, total in zip(self.terms, totals, strict=True)
            ]
            for part in parts
        ]

    @property
    def need_teacher(self) -> bool:
        return any(term.needs.teacher for term in self.terms)


def bind(stage: Stage, student: nn.Module, teacher: nn.Module | CachedTeacher | None) -> BoundTerms:
    """The stage's losses for these models.

    Raises:
        StageError: when a layer map matches nothing or a loss lacks its teacher.
        CacheError: when a loss looks inside a teacher of which only logits were kept.
    """
    losses: dict[str, Loss] = stage.loss_terms()
    live = teacher if isinstance(teacher, nn.Module) else student  # a cached teacher has no layers: names are checked
    terms = []
    for label, loss in losses.items():
        place = f"stage '{stage.name}', loss '{label}'"
        term = loss.bind(student, None if teacher is None else live, place)
        needs: Needs = term.needs
        if needs.teacher and teacher is None:
            raise StageError(f"{place} compares with a teacher, and there is none: pass teacher=, or use cross_entropy")
        if needs.inside_teacher and isinstance(teacher, CachedTeacher):
            raise CacheError(f"{place} looks inside the teacher, but the cache keeps logits only: use the live teacher")
        terms.append(term)
    return BoundTerms(tuple(losses), tuple(loss.weight for loss in losses.values()), tuple(terms))


def probe(
    terms: Sequence[Term],
    student: Teacher,
    teacher: Teacher | None,
    examples: Examples,
    seed: int,
    device: torch.device,
) -> None:
    """Run both models on one row and call `Term.prepare`, so that mistakes raise before any training.

    Raises:
        VocabularyError: when the models' logits differ in size.
    """
    rows = torch.tensor([0])
    given = examples.batch(rows, torch.Generator().manual_seed(seed))
    batch = to_device(given, device)
    mine = student.view(batch, rows)
    theirs = None if teacher is None else teacher.view(batch, rows)
    if any(term.needs.teacher_logits for term in terms):
        _check_vocabularies(mine, theirs)
    torch.manual_seed(seed)
    for term in terms:
        term.prepare(mine, theirs, batch)
        term.count(given)  # raises for what is missing in the batch


def _check_vocabularies(mine: View, theirs: View | None) -> None:
    if theirs is None or theirs.logits is None or not isinstance(mine.logits, Tensor):
        return
    other = theirs.logits.shape[-1] if isinstance(theirs.logits, Tensor) else theirs.logits.vocabulary
    if mine.logits.shape[-1] != other:
        raise VocabularyError(
            f"the student has {mine.logits.shape[-1]:,} logits and the teacher {other:,}: they must share a tokenizer, "
            "or the classes. Take a teacher of the same family, or losses without logits (hidden, ffn, attention)"
        )


@contextmanager
def training_mode(student: nn.Module, stage: Stage, running: Running) -> Iterator[set[str]]:
    """Set the student up for a stage, yield the names of its trainable parameters, and restore everything after it."""
    chosen = trainable_names(student, stage.trainable, f"stage '{stage.name}'")
    with ExitStack() as stack:
        for module in student.modules():
            stack.callback(setattr, module, "training", module.training)
        for name, parameter in student.named_parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(name in chosen)
        config = getattr(student, "config", None)
        if getattr(config, "use_cache", None) is not None:
            stack.callback(setattr, config, "use_cache", config.use_cache)  # type: ignore[union-attr]
            config.use_cache = False  # type: ignore[union-attr]
        if running.gradient_checkpointing:
            stack.callback(_checkpoint_activations(student))
        if running.compile:
            student.compile(backend="inductor" if running.compile is True else running.compile)
            stack.callback(setattr, student, "_compiled_call_impl", None)
        student.train()
        try:
            yield chosen
        finally:
            for parameter in student.parameters():
                parameter.grad = None


def _checkpoint_activations(student: nn.Module) -> Callable[[], None]:
    """Switch activation checkpointing on, by its newer or older name, and return what switches it off."""
    model: Any = student
    for kind in ("activation", "gradient"):
        if hasattr(model, f"{kind}_checkpointing_enable"):
            getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
            off: Callable[[], None] = getattr(model, f"{kind}_checkpointing_disable")
            return off
    raise StageError(f"{type(student).__name__} offers no gradient checkpointing: switch it off")
