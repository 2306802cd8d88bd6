"""A whole error curve from fits at a few sizes."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from tdkit.decompositions.base import Decomposition, Point

T = TypeVar("T")

SHARES = (0.08, 0.22, 0.4, 0.6, 0.8, 0.95)  # of the dense size, at which to fit
ANCHORS = (0.0, 0.15, 0.5, 0.9)  # places along a curve of upper estimates, at which to fit
LEAST_SHARE = 1e-3  # of an estimate, to which it may be lowered: below, it is all rounding error
BETWEEN = 8  # points from one fit to the next


def exact_curve(smaller: Sequence[tuple[int, Decomposition]], errors: Sequence[float]) -> list[Point]:
    """The choices (params ascending) with the errors they have, without those that gain nothing."""
    points: list[Point] = []
    for (params, choice), error in zip(smaller, errors, strict=True):
        if not points or (params > points[-1].params and error < points[-1].error):
            points.append(Point(choice, params, error))
    return points


def corrected_curve(points: Sequence[Point], error: Callable[[Decomposition], float | None]) -> list[Point]:
    """A curve of upper estimates lowered to fits at a few sizes, by shares that are interpolated between them.

    Args:
        points: by strictly rising params, with strictly falling, positive errors but for the last, which may be zero.
        error: of the fit of a choice; None where it is not known.
    """
    anchors = []
    for place in sorted({round((len(points) - 1) * share) for share in ANCHORS} if points else ()):
        estimate = points[place].error
        found = error(points[place].decomposition) if estimate > 0 else estimate
        if found is None:
            continue
        share = found / estimate if estimate > 0 else 1.0
        anchors.append((points[place].params, min(max(share, LEAST_SHARE), 1.0)))
    if not anchors:
        return list(points)
    lowered = []
    for point in points:
        after = bisect.bisect_left(anchors, (point.params, 0.0))
        (low, first), (high, second) = anchors[max(after - 1, 0)], anchors[min(after, len(anchors) - 1)]
        part = (point.params - low) / (high - low) if high > low else 0.0
        lowered.append((point.params, point.decomposition, point.error * first ** (1 - part) * second**part))
    return exact_curve([(params, kind) for params, kind, _ in lowered], [each for _, _, each in lowered])


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, spread evenly, the first and the last among them."""
    last = len(items) - 1
    if last < most:
        return list(items)
    return [items[round(last * i / (most - 1))] for i in range(most)]


def anchored(params: Sequence[int], size: int, shares: Sequence[float]) -> list[int]:
    """The places of the largest of some params, ascending, that are within each share of the dense `size`."""
    return sorted({max(bisect.bisect_right(params, share * size) - 1, 0) for share in shares} if params else ())


def lowest(points: Iterable[Point]) -> list[Point]:
    """Several curves merged: each point is less in error than all smaller ones of every curve."""
    merged: list[Point] = []
    for point in sorted(points, key=lambda point: (point.params, point.error)):
        if not merged or point.error < merged[-1].error:
            merged.append(point)
    return merged


def sampled_curve(
    smaller: Sequence[tuple[int, Decomposition]],
    size: int,
    errors: Callable[[list[int]], list[float]],
    shares: Sequence[float] = SHARES,
) -> list[Point]:
    """A whole error curve from fits at a few sizes: between them the logarithm of the error is interpolated.

    Args:
        smaller: (params, choice), ascending, all below the dense `size`.
        size: entries of the dense matrix.
        errors: from the params of a few choices, ascending, to their errors as fitted.
        shares: of the dense size, at which to fit.
    """
    params = [count for count, _ in smaller]
    wanted = anchored(params, size, shares)
    anchors: list[tuple[int, float]] = []
    for index, error in zip(wanted, errors([params[i] for i in wanted]) if wanted else [], strict=True):
        if not anchors or (params[index] > params[anchors[-1][0]] and 0 < error < anchors[-1][1]):
            anchors.append((index, error))
    chosen, between = [], []
    for (index, error), (next_index, next_error) in itertools.pairwise(anchors):
        for i in range(index, next_index, max(1, (next_index - index) // BETWEEN)):
            part = (params[i] - params[index]) / (params[next_index] - params[index])
            chosen.append(smaller[i])
            between.append(error ** (1 - part) * next_error**part)
    for index, error in anchors[-1:]:
        chosen.append(smaller[index])
        between.append(error)
    return exact_curve(chosen, between)
