"""The interfaces of model sources and text sources, and checks of what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from tdkit.errors import SourceError, TdkitError
from tdkit.registry import Registry

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A loaded model with its tokenizer.

    Attributes:
        name: the name that it was loaded by, for messages.
        model: any torch module.
        tokenizer: a callable used as ``tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]``, or
            None.
    """

    name: str
    model: nn.Module
    tokenizer: Any


class ModelSource(Protocol):
    """Loads the model behind a registered name: the type of the entry points ``tdkit.models``."""

    def __call__(self, part: str | None, *, dtype: torch.dtype) -> Source:
        """Load a model.

        Args:
            part: what follows the colon in ``NAME:PART``; None where there is none.
            dtype: of the weights.

        Raises:
            TdkitError: a `SourceError` when there is no such part.
        """


class TextSource(Protocol):
    """Loads the documents behind a registered name: the type of the entry points ``tdkit.texts``."""

    def __call__(self, part: str | None) -> list[str]:
        """Load texts, one string per document.

        Args:
            part: what follows the colon in ``NAME:PART``; None where there is none.

        Raises:
            TdkitError: a `SourceError` when there is no such part.
        """


def not_callable(_: str, found: object) -> str | None:
    """Returns why an object cannot be registered as a source, or None when it can."""
    return None if callable(found) else f"{found!r} is not a callable"


def call_source(registry: Registry[Any], name: str, load: Callable[[Any, str | None], object], kind: type[T]) -> T:
    """Call the source registered as ``NAME`` for a name ``NAME`` or ``NAME:PART`` and check its result.

    Args:
        registry: the registry of the source.
        name: ``NAME`` or ``NAME:PART``.
        load: a function (source, part or None) that calls the source.
        kind: the required type of the result.

    Raises:
        TdkitError: as raised by the source; a `SourceError` when it raises anything else or returns another type.
    """
    key, colon, part = name.partition(":")
    source = registry.get(key)
    place = f"{registry.noun} '{key}' of package {registry.origins()[key][0]}"
    try:
        found = load(source, part if colon else None)
    except TdkitError:
        raise
    except Exception as error:
        raise SourceError(f"{place} failed on '{name}': {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise SourceError(
            f"{place} returned a {type(found).__module__}.{type(found).__qualname__} for '{name}' instead of a "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    return found
