"""What tdkit raises: every error names the value, the place and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TdkitError(Exception):
    """Base of every error that tdkit raises on purpose."""


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


class RecipeError(TdkitError, ValueError):
    """A recipe is malformed, or one of its steps cannot run."""


class SourceError(TdkitError, ValueError):
    """A model or text cannot be found or read."""


class MissingDependencyError(TdkitError, ImportError):
    """An optional package is needed; the message says how to install it."""


class MissingPluginError(TdkitError, AttributeError):
    """A package of this project is needed that is not installed; the message says how to install it."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of `names`, or an empty string."""
    near = difflib.get_close_matches(name, sorted(set(names)), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
