"""Divisors and balanced splits, for any dimension."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tdkit.shapes import balanced_modes, divisors


@given(st.integers(1, 5000))
def test_divisors_are_all_of_them_in_order(n: int) -> None:
    assert list(divisors(n)) == [d for d in range(1, n + 1) if n % d == 0]


@given(st.integers(1, 20000), st.integers(1, 4))
def test_modes_are_balanced_and_span_the_dimension_with_little_padding(n: int, parts: int) -> None:
    modes = balanced_modes(n, parts)
    assert len(modes) == parts
    assert list(modes) == sorted(modes, reverse=True)
    assert n <= math.prod(modes) <= 1.25 * n
    assert min(modes) >= 1
    assert n < 64 or max(modes) <= 2.5 * min(modes)


def test_modes_of_familiar_dimensions() -> None:
    assert balanced_modes(768, 2) == (32, 24)
    assert math.prod(balanced_modes(3072, 3)) == 3072
    assert balanced_modes(13, 1) == (13,)
    assert balanced_modes(1, 3) == (1, 1, 1)
