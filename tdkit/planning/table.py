"""The table of a plan: a row per weight, or per group of equal layers of different depth in a long plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tdkit.models.sites import Untouchable
from tdkit.planning.step import Step
from tdkit.products.cost import DENSE
from tdkit.shapes import by
from tdkit.support.tables import table_of

if TYPE_CHECKING:
    from rich.table import Table

GROUP_ABOVE = 40  # rows above which similar layers of different depth share one
COLUMNS = ("layer", "shape", "becomes", "params", "of dense", "multiply-adds / token", "path at 1 | 512 tokens")


def plan_table(steps: Sequence[Step], untouchable: Sequence[Untouchable], *, every: bool = False) -> Table:
    """Returns a table with layer, shape, replacement, parameters, multiply-adds and paths.

    Relative error, estimated loss and runner-up are added where they are known.

    Args:
        every: one row per weight, however many there are.
    """
    extra = {
        "relative error": any(step.error is not None for step in steps),
        "loss, estimated": any(step.loss is not None for step in steps),
        "runner-up": any(step.runner_up is not None for step in steps),
    }
    columns = list(COLUMNS)
    if any(step.shape[2:] and step.paths for step in steps):
        columns = [name.replace("token", "token or position", 1) for name in columns]  # of a convolution's output
    shown = [len(COLUMNS) + i for i, wanted in enumerate(extra.values()) if wanted]
    table = table_of("", [*columns, *(name for name, wanted in extra.items() if wanted)])
    table.columns[2].justify = "left"
    one_by_one = every or len(steps) + len(untouchable) <= GROUP_ABOVE
    for group in [[step] for step in steps] if one_by_one else _groups(steps):
        row = _row(group)
        cells = [*row[: len(COLUMNS)], *(row[i] for i in shown)]
        table.add_row(*cells, style=None if group[0].decomposition else "dim")
    for alike in [[weight] for weight in untouchable] if one_by_one else _groups_of_kept(untouchable):
        table.add_row(*_row_of_kept(alike), style="yellow")
    return table


def _row_of_kept(group: Sequence[Untouchable]) -> list[str]:
    first = group[0]
    names = " = ".join(first.names) if len(group) == 1 else f"{_pattern(first.name)} ({len(group)} layers)"
    params = sum(weight.params for weight in group)
    size = [f"{params:,}", "100.0%"] if params else ["", ""]
    return [names, by(first.shape), f"kept: {first.reason}", *size]


def _groups_of_kept(untouchable: Sequence[Untouchable]) -> list[list[Untouchable]]:
    groups: dict[tuple[object, ...], list[Untouchable]] = {}
    for weight in untouchable:
        groups.setdefault((_pattern(weight.name), weight.shape, weight.reason), []).append(weight)
    return list(groups.values())


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _row(group: Sequence[Step]) -> list[str]:
    first = group[0]
    before, after = sum(s.params_before for s in group), sum(s.params_after for s in group)
    adds_before = sum(s.multiply_adds_before for s in group)
    adds_after = sum(s.multiply_adds_after for s in group)
    indices = sum(s.indices for s in group)
    params = f"{before:,}" if before == after else f"{before:,} -> {after:,}"
    errors = [s.error for s in group if s.error is not None]
    losses = [s.loss for s in group if s.loss is not None]
    return [
        _common_name(group) + (f" ({len(group)} layers)" if len(group) > 1 else ""),
        by(first.shape),
        _becomes(group) + (", computed dense" if first.computed == DENSE else ""),
        params + (f" (+{indices:,} indices)" if indices else ""),
        f"{after / before:.1%}" if before else "",
        f"{adds_before:,}" if adds_before == adds_after else f"{adds_before:,} -> {adds_after:,}",
        _paths(group),
        f"{sum(errors) / len(errors):.4f}" if errors else "",
        f"{sum(losses):.3g}" if losses else "",
        (first.runner_up or "") if len(group) == 1 else "",
    ]


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


def _groups(steps: Sequence[Step]) -> list[list[Step]]:
    groups: dict[tuple[object, ...], list[Step]] = {}
    for step in steps:
        kind = step.decomposition.name if step.decomposition else None
        key = (_pattern(step.name), step.shape, kind, step.reason, step.computed)
        groups.setdefault(key, []).append(step)
    return list(groups.values())


def _common_name(group: Sequence[Step]) -> str:
    return " = ".join(group[0].names) if len(group) == 1 else _pattern(group[0].name)
