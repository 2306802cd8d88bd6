"""What a model source and a text source are, and what every source is asked and checked for."""

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
        name: what it was loaded by, for people.
        model: any torch module.
        tokenizer: called as ``tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]``; None where
            there is none.
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
    """What is wrong with an object that is registered as a source; None when it is one."""
    return None if callable(found) else f"{found!r} is not a callable"


def call_source(registry: Registry[Any], name: str, load: Callable[[Any, str | None], object], kind: type[T]) -> T:
    """What the source registered under ``NAME`` returns for ``NAME`` or ``NAME:PART``.

    Args:
        load: calls the source with the part.
        kind: what it must return.

    Raises:
        TdkitError: the source's own; a `SourceError` when it raises anything else or returns another type.
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
