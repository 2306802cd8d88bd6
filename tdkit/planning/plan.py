"""The plan of a compression: what each weight matrix is replaced by, to print, edit or save before it is applied."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tdkit.errors import PolicyError, TdkitError
from tdkit.planning.step import Step
from tdkit.shapes import by
from tdkit.support.tables import render, table_of

if TYPE_CHECKING:
    from rich.table import Table

FORMAT_VERSION = 1
GROUP_ABOVE = 40  # longer plans show similar layers of different depth in one row


@dataclass(frozen=True)
class Plan:
    """Every weight matrix of a model and the decomposition that replaces it, if any.

    Attributes:
        steps: one per weight matrix, in the model's order; includes those that stay dense.
        params_before: parameters of the dense model, tied weights counted once.
        params_after: parameters of the compressed model, tied weights counted once.
        kept: maps the name of each layer that tdkit cannot rewrite to the reason.
        budget: the budget of the policy, params after / params before; None when it has none.
    """

    steps: tuple[Step, ...]
    params_before: int
    params_after: int
    kept: Mapping[str, str]
    budget: float | None = None

    @property
    def ratio(self) -> float:
        """Params after / params before of the whole model."""
        return self.params_after / self.params_before if self.params_before else 1.0

    @property
    def rewritten(self) -> tuple[Step, ...]:
        """The steps that replace a weight."""
        return tuple(step for step in self.steps if step.decomposition is not None)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, name: str) -> Step:
        """Returns the step of the layer called `name`.

        Raises:
            KeyError: when no step has such a layer.
        """
        for step in self.steps:
            if name in step.names:
                return step
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": FORMAT_VERSION,
            "budget": self.budget,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "steps": [step.to_dict() for step in self.steps],
            "kept": dict(self.kept),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Plan:
        """Returns a plan from the form that `to_dict` returns.

        Raises:
            PolicyError: when the form is invalid; the message lists the faults of all steps.
        """
        if not isinstance(form, Mapping):
            raise PolicyError(f"not a tdkit plan: it is a {type(form).__name__}, not a mapping")
        wanted = {"version": int, "params_before": int, "params_after": int, "steps": list, "kept": Mapping}
        for key, kind in wanted.items():
            if not isinstance(form.get(key), kind):
                raise PolicyError(f"not a tdkit plan: {key}={form.get(key)!r} must be a {kind.__name__}")
        if form["version"] > FORMAT_VERSION:
            raise PolicyError(f"plan version {form['version']} is newer than {FORMAT_VERSION}: update tdkit")
        steps, faults = [], []
        for number, step in enumerate(form["steps"]):
            try:
                steps.append(Step.from_dict(step, f"step {number}"))
            except TdkitError as error:
                faults.append(str(error) if isinstance(error, PolicyError) else f"step {number}: {error}")
        if faults:
            raise PolicyError("not a tdkit plan:\n" + "\n".join(faults))
        return cls(tuple(steps), form["params_before"], form["params_after"], dict(form["kept"]), form.get("budget"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise PolicyError(f"not a tdkit plan: {error}") from None

    def summary(self) -> str:
        """Returns one line with the parameters before and after, the ratio and the budget."""
        asked = f", budget {self.budget:g}" if self.budget is not None else ""
        return (
            f"{self.params_before:,} -> {self.params_after:,} params (ratio {self.ratio:.4f}{asked}), "
            f"{len(self.rewritten)} of {len(self.steps)} matrices rewritten"
        )

    def table(self, *, every: bool = False) -> Table:
        """Returns a table with layer, shape, replacement, parameters, multiply-adds and paths.

        Relative error, estimated loss and runner-up are added where they are known.

        Args:
            every: one row per layer even in a long plan; otherwise layers that differ only in their depth
                and have the same shape and decomposition share a row, with the range of their ranks.
        """
        columns = ["layer", "shape", "becomes", "params", "of dense", "multiply-adds / token", "path at 1 | 512 tokens"]
        with_error = any(step.error is not None for step in self.steps)
        with_loss = any(step.loss is not None for step in self.steps)
        with_choice = any(step.runner_up is not None for step in self.steps)
        extra = {"relative error": with_error, "loss, estimated": with_loss, "runner-up": with_choice}
        shown = [len(columns) + i for i, wanted in enumerate(extra.values()) if wanted]
        table = table_of(self.summary(), [*columns, *(name for name, wanted in extra.items() if wanted)])
        table.columns[2].justify = "left"
        one_by_one = every or len(self.steps) <= GROUP_ABOVE
        for group in [[s] for s in self.steps] if one_by_one else _groups(self.steps):
            row = _row(group)
            cells = [*row[: len(columns)], *(row[i] for i in shown)]
            table.add_row(*cells, style=None if group[0].decomposition else "dim")
        for name, reason in self.kept.items():
            table.add_row(name, "", f"kept: {reason}", *[""] * (len(table.columns) - 3), style="dim")
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return render(self.table())


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
        _becomes(group),
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
        pattern = tuple("*" if part.isdigit() else part for part in step.name.split("."))
        key = (pattern, step.shape, step.decomposition.name if step.decomposition else None, step.reason)
        groups.setdefault(key, []).append(step)
    return list(groups.values())


def _common_name(group: Sequence[Step]) -> str:
    if len(group) == 1:
        return " = ".join(group[0].names)
    return ".".join("*" if part.isdigit() else part for part in group[0].name.split("."))
