"""What tdkit raises: every error names the value, the place and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 20_000  # characters of a message: what is quoted in it may come from any file


class TdkitError(Exception):
    """Base of every error that tdkit raises on purpose."""

    def __init__(self, *arguments: object) -> None:
        first = arguments[0] if arguments else None
        if isinstance(first, str) and len(first) > LONGEST:
            arguments = (f"{first[:LONGEST]} ... and {len(first) - LONGEST:,} characters more", *arguments[1:])
        super().__init__(*arguments)


class OptionError(TdkitError, ValueError):
    """An option of a decomposition cannot be met, alone or for the shape at hand."""


class PolicyError(TdkitError, ValueError):
    """A rule or policy is malformed, or selects nothing."""


class BudgetError(TdkitError, ValueError):
    """A parameter budget cannot be met by the layers a policy selects."""


class CalibrationError(TdkitError, ValueError):
    """Batches, or the moments measured on them, do not fit the model."""


class EvaluationError(TdkitError, ValueError):
    """A model cannot be measured in the way asked for."""


class AdapterError(TdkitError, ValueError):
    """An adapter, such as LoRA, cannot be put on a factorised layer or merged into it in the way asked for."""


class CheckpointError(TdkitError, ValueError):
    """A saved folder is missing, damaged, foreign or of a newer format."""


class RegistryError(TdkitError, LookupError):
    """A name is unknown, taken twice, or its entry point fails to import."""

    def __str__(self) -> str:  # LookupError's children print their message in quotes
        return str(self.args[0]) if self.args else ""


class WriteError(TdkitError, OSError):
    """A file or folder cannot be written: the disk is full, or nothing may be written there."""


class RecipeError(TdkitError, ValueError):
    """A recipe is malformed, or one of its steps cannot run."""


class SourceError(TdkitError, ValueError):
    """A model or text cannot be found or read."""


class MissingDependencyError(TdkitError, ImportError):
    """An optional package is needed; the message says how to install it."""


class MissingPluginError(TdkitError, AttributeError):
    """A package of this project is needed that is not installed; the message says how to install it."""


def reason_of(error: BaseException) -> str:
    """Returns the first line of the message of an exception, after its class where this alone says nothing."""
    lines = str(error).strip().splitlines()
    said = lines[0] if lines else ""
    return said if isinstance(error, TdkitError | OSError) and said else f"{type(error).__name__}: {said}".rstrip(": ")


@contextmanager
def told_as(kind: type[TdkitError], place: str, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """A context manager that raises `kind` in place of every exception of the block that is not a `TdkitError`.

    For code of other packages that works on what a file says, which may be anything: a config of sizes that do not go
    together ends in a ``ZeroDivisionError`` somewhere inside.

    Args:
        kind: the class of the error.
        place: begins the message; the exception's own text follows.
        but: exceptions that are left as they are, since the caller knows them.
    """
    try:
        yield
    except TdkitError:
        raise
    except but:
        raise
    except Exception as error:
        raise kind(f"{place}: {reason_of(error)}") from error


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of `names`, or an empty string."""
    near = difflib.get_close_matches(name, sorted(set(names)), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
