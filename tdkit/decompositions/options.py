"""Checks of a decomposition's options."""

from __future__ import annotations

from tdkit.errors import OptionError
from tdkit.shapes import Shape


def positive(owner: str, option: str, value: object) -> None:
    """Raise OptionError unless `value` is None or an integer of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise OptionError(f"{owner}: {option}={value!r} must be an integer of at least 1")


def pair(owner: str, option: str, value: object) -> Shape | None:
    """`value` as a tuple of two positive integers, or None; OptionError otherwise."""
    if value is None:
        return None
    entries = integers(owner, option, value)
    if len(entries) != 2:
        raise OptionError(f"{owner}: {option}={value!r} must be two integers, (rows, columns)")
    return entries[0], entries[1]


def integers(owner: str, option: str, value: object) -> tuple[int, ...]:
    """`value` as a tuple of positive integers; OptionError otherwise."""
    if not isinstance(value, list | tuple) or not value:
        raise OptionError(f"{owner}: {option}={value!r} must be a list of integers")
    for entry in value:
        positive(owner, option, entry)
        if entry is None:
            raise OptionError(f"{owner}: {option}={value!r} must be a list of integers")
    return tuple(value)
