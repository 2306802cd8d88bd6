"""Errors: one family, messages as written, the nearest name."""

from __future__ import annotations

import inspect

import pytest

from tdkit import errors
from tdkit.errors import MissingDependencyError, RegistryError, TdkitError, did_you_mean

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
