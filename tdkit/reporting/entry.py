"""One compressed model of a report, with what its sentence, its table row and its figures are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdkit.planning.plan import megabytes, percent
from tdkit.records.record import THEN, Record

SIZES = ("params", "bytes", "tokens_per_second")
STDERR = "_stderr"  # how the names of standard errors end
UNKNOWN = "not known"


@dataclass(frozen=True)
class Training:
    """The losses of one distillation.

    Attributes:
        name: of the folder that held the log.
        stages: by stage, in order: its terms with (step, value) pairs, the steps counted over all stages; the sum of
            the weighted terms is called 'loss'.
        held_out: (steps so far, loss on the held-out rows).
    """

    name: str
    stages: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
    held_out: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Entry:
    """One compressed model.

    Attributes:
        record: what is recorded of it.
        place: the folder it was found in.
        again: the command that does it again; None where none is known.
        training: the losses of distillations that followed.
        unknown: what is not known of it and how it could be, one sentence each.
    """

    record: Record
    place: Path
    again: str | None = None
    training: tuple[Training, ...] = ()
    unknown: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def series(self) -> str:
        """The decomposition of the weights, or all of them; what points of one colour have in common."""
        if asked := self.record.options.get("with"):
            return str(asked)
        used = self.decompositions
        return " + ".join(used) if used else "none"

    @property
    def decompositions(self) -> dict[str, int]:
        """The number of weights by the name of their decomposition."""
        found: dict[str, int] = {}
        for step in self.record.plan.rewritten if self.record.plan else ():
            assert step.decomposition is not None
            found[step.decomposition.name] = found.get(step.decomposition.name, 0) + 1
        return found

    @property
    def metrics(self) -> list[str]:
        """The metrics that were measured before or after."""
        names = dict.fromkeys([*self.record.dense, *self.record.compressed])
        return [name for name in names if name not in SIZES and not name.endswith(STDERR)]

    def ratio(self, name: str) -> float | None:
        """Returns a figure of the compressed model / that of the dense one; None where one is not known."""
        before, after = self.record.dense.get(name), self.record.compressed.get(name)
        return None if not before or after is None else after / before

    def sentence(self) -> str:
        """Returns what was done in one sentence."""
        record = self.record
        if record.failure:
            return f"{record.model}: nothing was made: {record.failure}"
        made = ", ".join(f"{count} by {name}" for name, count in self.decompositions.items())
        weights = "" if record.plan is None else f" of {len(record.plan.steps) + len(record.plan.untouchable)}"
        done = (
            f"{sum(self.decompositions.values())}{weights} weights are replaced ({made})"
            if made
            else "no weight is replaced"
        )
        then = "".join(f", then {each}" for each in record.options.get(THEN, ()))
        return f"{record.model} ({record.class_name}): {done}{then}; {self.result()}."

    def result(self) -> str:
        """Returns sizes, quality and speed before and after, or why there is no compressed model."""
        record = self.record
        if record.failure:
            return record.failure
        parts = [
            _changed("parameters", record.dense.get("params"), record.compressed.get("params"), _count),
            _changed("", record.dense.get("bytes"), record.compressed.get("bytes"), _bytes),
            *(
                _changed(name, record.dense.get(name), record.compressed.get(name), _figure, times=True)
                for name in self.metrics
            ),
            _changed(
                "tokens/s",
                record.dense.get("tokens_per_second"),
                record.compressed.get("tokens_per_second"),
                _count,
                times=True,
            ),
        ]
        return ", ".join(part for part in parts if part)

    def row(self, metrics: Sequence[str]) -> list[str]:
        """Returns the row of the table of all models, for some metrics."""
        record = self.record
        cells = [self.name, *(_pair(record, name, form) for name, form in (("params", _count), ("bytes", _bytes)))]
        cells.append(UNKNOWN if (ratio := self.ratio("params")) is None else percent(ratio))
        cells += [_pair(record, metric, _figure) for metric in metrics]
        cells.append(_pair(record, "tokens_per_second", _count))
        return cells


def columns(metrics: Sequence[str]) -> list[str]:
    """Returns the headers of the table of all models."""
    return ["model", "parameters", "bytes", "of dense", *metrics, "tokens/s"]


def _pair(record: Record, name: str, form: Any) -> str:
    before, after = record.dense.get(name), record.compressed.get(name)
    if after is None:
        return UNKNOWN if before is None else f"{form(before)} → {UNKNOWN}"
    error = record.compressed.get(f"{name}{STDERR}")
    spread = "" if error is None else f" ± {_figure(error)}"
    return f"{form(after)}{spread}" if before is None else f"{form(before)} → {form(after)}{spread}"


def _changed(what: str, before: float | None, after: float | None, form: Any, *, times: bool = False) -> str:
    if after is None:
        return ""
    if before is None:
        return f"{form(after)} {what}".strip()
    label = f"{what} " if what else ""
    both = f"{label}{form(before)} → {form(after)}"
    if not before:  # nothing is a multiple of 0
        return both
    change = f"{after / before:.3g} x" if times else percent(after / before)
    return f"{both} ({change})"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    return megabytes(int(value))


def _figure(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:.3g}"
