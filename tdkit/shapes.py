"""Integer arithmetic of factor shapes: divisors, splits of a dimension, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import cast

Shape = tuple[int, ...]  # (out, in) of a matrix; (out, in, *kernel) of a tensor


@cache
def divisors(n: int) -> tuple[int, ...]:
    """All divisors of `n`, ascending."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(low + [n // d for d in reversed(low) if d * d != n])


@cache
def balanced_modes(n: int, parts: int) -> tuple[int, ...]:
    """Split `n` into `parts` modes as equal as possible, descending.

    When `n` itself splits badly (a prime, say), a slightly larger number is split instead and the caller
    pads. The modes with the smallest spread times padding win: the spread is their arithmetic mean over
    their geometric mean, the padding is the size they span over `n`.
    """
    if parts == 1:
        return (n,)
    root = round(n ** (1 / parts))

    def cost(modes: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        size = math.prod(modes)
        return sum(modes) / (parts * size ** (1 / parts)) * size / n, modes

    first_modes = range(max(1, root // 2), 2 * root + 1)
    splits = ((m, *balanced_modes(-(-n // m), parts - 1)) for m in first_modes)
    return min((tuple(sorted(modes, reverse=True)) for modes in splits), key=cost)


def by(shape: Shape) -> str:
    """Format a shape: ``64x32x3x3``."""
    return "x".join(map(str, shape))


LARGEST = 2**40  # numbers in one weight, more than any machine holds: sizes beyond it are refused before arithmetic


def is_weight_shape(sizes: Sequence[object]) -> bool:
    """Returns whether these are two sizes or more, each a positive integer, of at most `LARGEST` numbers together."""
    if not 2 <= len(sizes) <= 16 or not all(type(size) is int and size > 0 for size in sizes):
        return False
    return math.prod(cast("Sequence[int]", sizes)) <= LARGEST
