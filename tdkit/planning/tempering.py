"""Moves the numbers of units that an allocator chose towards their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tdkit.decompositions.shrink import Shrink
from tdkit.models.groups.group import Bundle
from tdkit.planning.allocation import Choice, OpenSite


def tempered(sites: Sequence[OpenSite], choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """Returns `choices` with the units of MLPs that are alike moved towards their mean by `Shrink.temper`.

    The estimate takes the loss for a sum over layers, and is the further below the true one the more an allocation
    takes from few layers. The sum of the units, and so of the parameters, does not grow.
    """
    alike: dict[object, list[OpenSite]] = {}
    for each in sites:
        mlp = isinstance(each.site, Bundle) and not each.site.groups[0].keeps_sizes
        if mlp and isinstance(each.kind, Shrink) and each.kind.temper:
            alike.setdefault((each.kind, each.site.shape), []).append(each)
    moved = dict(choices)
    for members in alike.values():
        kind = members[0].kind
        assert isinstance(kind, Shrink)
        before = [_units(each, choices[each.site.name]) for each in members]
        if len(set(before)) == 1:
            continue
        for each, units in zip(members, _nearer(members, before, kind), strict=True):
            old = choices[each.site.name]
            if units == each.site.shape[0]:
                moved[each.site.name] = Choice(None, old.reason or "its parameters pay where they are", old.error)
            else:
                moved[each.site.name] = replace(old, decomposition=replace(kind, units=units), reason="")
    return moved


def _units(each: OpenSite, choice: Choice) -> int:
    kind = choice.decomposition
    return kind.units if isinstance(kind, Shrink) and kind.units is not None else each.site.shape[0]


def _nearer(members: Sequence[OpenSite], before: Sequence[int], kind: Shrink) -> list[int]:
    """Returns numbers of units, multiples of the kind's step or all of a group, with at most the sum of `before`."""
    step = kind.step(members[0].site.shape[0])
    mean = sum(before) / len(before)
    wanted = [units + kind.temper * (mean - units) for units in before]
    found = [_within(each, math.floor(w / step) * step) for each, w in zip(members, wanted, strict=True)]
    left = sum(before) - sum(found)
    for place in sorted(range(len(found)), key=lambda i: found[i] - wanted[i]):  # the most rounded down first
        more = _within(members[place], found[place] + step) - found[place]
        if 0 < more <= left:
            found[place], left = found[place] + more, left - more
    return found if left >= 0 else list(before)


def _within(each: OpenSite, units: int) -> int:
    """Returns `units` within the bounds of a group."""
    most = each.site.shape[0]
    low, high = max(math.ceil(each.clipped(0) * most), 1), math.floor(each.clipped(1) * most)
    return min(max(units, low), high)
