"""The rows of a plan's table: one per weight, or per group of equal layers of different depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tdkit.models.sites import Untouchable
from tdkit.planning.step import Step
from tdkit.products.cost import DENSE
from tdkit.shapes import by


@dataclass(frozen=True)
class Row:
    """The texts of one row, by column.

    Attributes:
        cells: by the names in `tdkit.planning.table.COLUMNS`; empty where there is nothing to say.
        short: cells with rounded numbers, for narrow tables.
        style: of the text.
    """

    cells: dict[str, str]
    short: dict[str, str]
    style: str | None = None


def row_of(group: Sequence[Step]) -> Row:
    """Returns the row of equal steps."""
    first = group[0]
    before, after = sum(s.params_before for s in group), sum(s.params_after for s in group)
    adds_before = sum(s.multiply_adds_before for s in group)
    adds_after = sum(s.multiply_adds_after for s in group)
    indices = sum(s.indices for s in group)
    errors = [s.error for s in group if s.error is not None]
    losses = [s.loss for s in group if s.loss is not None]
    cells = {
        "layer": name_of(group),
        "shape": by(first.shape),
        "becomes": _becomes(group) + (", computed dense" if first.computed == DENSE else ""),
        "params": _change(before, after) + (f" (+{indices:,} indices)" if indices else ""),
        "of dense": f"{after / before:.1%}" if before else "",
        "multiply-adds": _change(adds_before, adds_after),
        "path": _paths(group),
        "relative error": f"{sum(errors) / len(errors):.4f}" if errors else "",
        "loss": f"{sum(losses):.3g}" if losses else "",
        "runner-up": (first.runner_up or "") if len(group) == 1 else "",
    }
    short = {
        "layer": name_of(group, short=True),
        "params": _change(before, after, short=True) + (f" +{_rounded(indices)}" if indices else ""),
        "multiply-adds": _change(adds_before, adds_after, short=True),
    }
    return Row(cells, short, None if first.decomposition else "dim")


def row_of_kept(group: Sequence[Untouchable]) -> Row:
    """Returns the row of equal weights that cannot be rewritten."""
    first = group[0]
    params = sum(weight.params for weight in group)
    cells = {"layer": name_of(group), "shape": by(first.shape), "becomes": f"kept: {first.reason}"}
    if params:
        cells |= {"params": f"{params:,}", "of dense": "100.0%"}
    return Row(cells, {"params": _rounded(params)} if params else {}, "yellow")


def kept_lines(steps: Sequence[Step], untouchable: Sequence[Untouchable], names: int = 3) -> list[str]:
    """Returns one line for every reason why weights stay dense: the reason, the largest of them, and how many.

    Args:
        names: the maximum number of layers, or groups of equal ones, that a line names.
    """
    reasons: dict[str, list[Step | Untouchable]] = {}
    dense: list[Step | Untouchable] = [step for step in steps if step.decomposition is None]
    for weight in [*dense, *untouchable]:
        reasons.setdefault(weight.reason, []).append(weight)
    lines = []
    for reason, kept in reasons.items():
        groups: dict[object, list[Step | Untouchable]] = {}
        for weight in kept:
            groups.setdefault((pattern(weight.name), weight.shape), []).append(weight)
        largest = sorted(groups.values(), key=lambda group: -sum(map(_params, group)))
        shown = [name_of(group) for group in largest[:names]]
        if len(largest) > names:
            shown.append(f"and {sum(map(len, largest[names:]))} more")
        params = sum(map(_params, kept))
        lines.append(f"kept: {reason}: {', '.join(shown)}" + (f"; {params:,} params" if params else ""))
    return lines


def groups_of(steps: Sequence[Step]) -> list[list[Step]]:
    """Returns the steps in groups that differ in their depth and the options of their decompositions only."""
    groups: dict[tuple[object, ...], list[Step]] = {}
    for step in steps:
        kind = step.decomposition.name if step.decomposition else None
        groups.setdefault((pattern(step.name), step.shape, kind, step.reason, step.computed), []).append(step)
    return list(groups.values())


def name_of(group: Sequence[Step | Untouchable], *, short: bool = False) -> str:
    """Returns the names of one layer, or the pattern of several and their number."""
    first = group[0]
    if len(group) == 1:
        return " = ".join(first.names)
    return f"{pattern(first.name)} x{len(group)}" if short else f"{pattern(first.name)} ({len(group)} layers)"


def pattern(name: str) -> str:
    """Returns a name with stars for its numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _params(weight: Step | Untouchable) -> int:
    return weight.params_before if isinstance(weight, Step) else weight.params


def _change(before: int, after: int, *, short: bool = False) -> str:
    show = _rounded if short else "{:,}".format
    return show(before) if before == after else f"{show(before)} -> {show(after)}"


def _rounded(count: int) -> str:
    """Format a number with three digits and a unit."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            value = count / size
            return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}{unit}"
    return str(count)


def _paths(group: Sequence[Step]) -> str:
    """Format the paths at 1 and at 512 tokens, as one if they are equal; lists all where the steps differ."""
    found = [" or ".join(dict.fromkeys(step.paths[k] for step in group if step.paths)) for k in (0, 1)]
    return found[0] if found[0] == found[1] else " | ".join(found)


def _becomes(group: Sequence[Step]) -> str:
    """Format the decomposition with its options, or with their ranges where they differ within the group."""
    first = group[0].decomposition
    if first is None:
        return f"kept: {group[0].reason}"
    others = [step.decomposition.options() for step in group if step.decomposition is not None]
    if all(options == others[0] for options in others):
        return first.describe()
    ranges = []
    for option in others[0]:
        values: list[Any] = [options.get(option) for options in others]
        if all(value == values[0] for value in values):
            ranges.append(f"{option}={'x'.join(map(str, values[0])) if isinstance(values[0], list) else values[0]}")
        elif all(isinstance(value, int) for value in values):
            ranges.append(f"{option}={min(values)}..{max(values)}")
        else:
            ranges.append(f"{option} varies")
    return f"{first.name}({', '.join(ranges)})"
