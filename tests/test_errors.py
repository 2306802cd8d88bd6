"""Errors: one family, messages as written, the nearest name."""

from __future__ import annotations

import inspect

import pytest

from tdkit import errors
from tdkit.errors import (
    MissingDependencyError,
    OptionError,
    PolicyError,
    RegistryError,
    TdkitError,
    did_you_mean,
    told_as,
)

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, Exception) and kind is not TdkitError
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_a_tdkit_error_that_prints_its_message_as_it_is(kind: type[TdkitError]) -> None:
    error = kind("layer 'x' is missing")
    assert isinstance(error, TdkitError)
    assert str(error) == "layer 'x' is missing"


def test_errors_can_be_caught_by_python_s_own_kinds() -> None:
    assert issubclass(RegistryError, LookupError)
    assert issubclass(MissingDependencyError, ImportError)
    assert str(RegistryError()) == ""


@pytest.mark.parametrize(
    ("name", "hint"),
    [("low_rnak", "; did you mean 'low_rank'?"), ("kroneker", "; did you mean 'kronecker'?"), ("zzz", "")],
)
def test_the_nearest_name_is_suggested(name: str, hint: str) -> None:
    assert did_you_mean(name, ["low_rank", "kronecker", "tt_matrix"]) == hint


def test_what_a_message_quotes_is_cut() -> None:
    assert len(str(TdkitError("x" * 10**6))) < 25_000
    assert str(TdkitError("x" * 10**6)).endswith("and 980,000 characters more")


def test_errors_of_other_packages_become_ours() -> None:
    said = "the place: ZeroDivisionError: division by zero"
    with pytest.raises(OptionError, match=said) as caught, told_as(OptionError, "the place"):
        _ = 1 / 0
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(PolicyError, match="ours"), told_as(OptionError, "the place"):
        raise PolicyError("ours")
    with pytest.raises(KeyboardInterrupt), told_as(OptionError, "the place"):
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="theirs"), told_as(OptionError, "the place", but=(OSError,)):
        raise OSError("theirs")
