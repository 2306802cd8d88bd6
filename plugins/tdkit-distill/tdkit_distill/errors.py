"""The errors of tdkit-distill: each names the value, the place and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tdkit.errors import TdkitError


class DistillError(TdkitError):
    """Base class of the errors of tdkit-distill."""


class StageError(DistillError, ValueError):
    """A stage, or one of its losses, is malformed or does not fit the models."""


class VocabularyError(DistillError, ValueError):
    """Teacher and student have vocabularies of different sizes."""


class DataError(DistillError, ValueError):
    """Training data is missing, too short, or not what the run was started with."""


class CacheError(DistillError, ValueError):
    """A cache of teacher logits is missing, damaged, or of another teacher, text or setting."""


class ResumeError(DistillError, ValueError):
    """A run folder does not belong to the run that asks for it, or holds no whole checkpoint."""


class NotFiniteError(DistillError, ArithmeticError):
    """A loss term turned NaN or infinite; the last checkpoint is from before it."""


class StorageError(DistillError, OSError):
    """A checkpoint or cache could not be written, mostly because the disk is full."""


class InterruptedRun(DistillError):  # noqa: N818 - not a fault: the run was asked to stop and has saved itself
    """A signal asked the run to stop; it saved a checkpoint first and can go on from there.

    Attributes:
        history: of the run so far, as in `Result`.
    """

    def __init__(self, message: str, history: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.history = list(history)


class HealingWarning(UserWarning):
    """Healing made a text of another kind worse, or could not measure one."""
