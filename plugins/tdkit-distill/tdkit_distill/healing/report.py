"""The report of healing: perplexity of every held-out text against tokens and seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table, table_of

from tdkit_distill.errors import DataError
from tdkit_distill.healing.estimate import Estimate, duration
from tdkit_distill.loop.held_out import best_of

FORMAT = 1
WORSE = 0.01  # by how much another text may get worse before there is a warning


@dataclass(frozen=True)
class Measurement:
    """Perplexities after some training.

    Attributes:
        steps: optimizer steps until then.
        tokens: trained on until then.
        seconds: that the run had taken.
        perplexity: by text; the first one is of the data's kind.
    """

    steps: int
    tokens: int
    seconds: float
    perplexity: dict[str, float]


@dataclass(frozen=True)
class Healing:
    """What healing did to a model.

    Attributes:
        measurements: the first one is from before it; none after a dry run.
        kept: number of the measurement whose weights the model has, the lowest on the first text.
        teacher: the teacher's perplexity by text; None without a teacher.
        finished: False when the run was interrupted.
        settings: what was asked for, and the defaults that were taken.
        estimate: what was foretold; None when a finished run was only read again.
        notes: what was not measured, and why.
    """

    measurements: tuple[Measurement, ...]
    kept: int
    teacher: dict[str, float] | None
    finished: bool
    settings: dict[str, Any]
    estimate: Estimate | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def before(self) -> Measurement:
        """Of the model as it was given."""
        return self.measurements[0]

    @property
    def after(self) -> Measurement:
        """Of the weights that the model has now."""
        return self.measurements[self.kept]

    @property
    def warnings(self) -> list[str]:
        """One for each text of another kind that has got worse by more than 1%."""
        if not self.measurements:
            return []
        first, *others = self.before.perplexity
        found = []
        for name in others:
            before, after = self.before.perplexity[name], self.after.perplexity[name]
            if not after <= before * (1 + WORSE):
                found.append(
                    f"healing made '{name}' worse: perplexity {after:.4g} after {before:.4g}, while '{first}' went "
                    f"from {self.before.perplexity[first]:.4g} to {self.after.perplexity[first]:.4g}. The training "
                    "text is too narrow for other uses of the model: mix other texts into it, or train on fewer tokens"
                )
        return found

    def table(self) -> Table:
        """A row per measurement; the one whose weights were kept is marked."""
        return table_of("perplexity", *self._cells())

    def markdown(self) -> str:
        """The same as Markdown."""
        return markdown_table(*self._cells())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT, **asdict(self), "warnings": self.warnings}

    def save(self, path: Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        names = list(self.before.perplexity)
        rows = []
        if self.teacher is not None:
            rows.append(["teacher", "", "", *(f"{self.teacher[name]:.4g}" for name in names)])
        for number, each in enumerate(self.measurements):
            label = "before" if not number else f"{each.steps:,} steps"
            label += " (kept)" if number == self.kept else ""
            figures = [f"{each.perplexity[name]:.4g}" for name in names]
            rows.append([label, f"{each.tokens:,}", duration(each.seconds), *figures])
        return ["", "tokens", "time", *names], rows


def measurements_of(history: Sequence[Mapping[str, Any]], first: str) -> tuple[tuple[Measurement, ...], int]:
    """The measurements in a run's history, and the number of the best one.

    Raises:
        DataError: when there is none.
    """
    entries = [entry for entry in history if "held_out" in entry]
    if not entries:
        raise DataError("this run has measured nothing yet")
    found = tuple(
        Measurement(
            entry["total"],
            entry["tokens"],
            entry["clock"],
            {name: perplexity(loss) for name, loss in {first: entry["held_out"], **entry.get("others", {})}.items()},
        )
        for entry in entries
    )
    best = best_of({number: entry["held_out"] for number, entry in enumerate(entries)})
    return found, best


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
