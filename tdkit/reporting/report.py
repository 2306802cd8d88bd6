"""Write the report: a page, its numbers as JSON and, if asked for, its figures as PNG and SVG."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from tdkit.errors import CheckpointError, MissingDependencyError
from tdkit.planning.plan import percent
from tdkit.records.record import THEN
from tdkit.records.tree import render_tree
from tdkit.reporting.drawing import FAINT, INK, SERIES, Drawing
from tdkit.reporting.entry import Entry, columns
from tdkit.reporting.frontier import frontiers, training_drawings
from tdkit.reporting.gather import Gathered, gather
from tdkit.reporting.layers import layer_drawings
from tdkit.shapes import by
from tdkit.support.files import whole_folder
from tdkit.support.version import VERSION
from tdkit.sweeps.choice import choose

FORM = "tdkit-report/1"
FOLDER = "report"  # in the folder that is reported
PAGE, NUMBERS, FIGURES = "report.html", "report.json", "figures"
DARK = ("#5aaee8", "#ff8a4a", "#35c79b", "#e3a1c9", "#8fd0f5", "#f3b94d", "#9ea1ab")  # the series on a dark page
INSTALL = "pip install 'tdkit[report]'"
WITHIN = 0.05  # of the dense model's metric, for the model that the report recommends


def check_installed() -> None:
    """Check that what reports are made with is installed.

    Raises:
        MissingDependencyError: otherwise; the message says how to install it.
    """
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"a report needs {' and '.join(missing)}: {INSTALL}")


def write_report(
    places: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    figures: bool = True,
    within: float | None = None,
) -> Path:
    """Write the report on folders that tdkit wrote.

    Args:
        places: saved models, runs, sweeps, folders of distillation, and files of ``tdkit eval --out``.
        out: the folder to write, which is replaced; when None, ``report`` in the first place, which must be a folder.
        figures: also write each figure as PNG and SVG.
        within: the loss for which a model is recommended, as a fraction of the dense model's metric; when None, that of
            the sweep, or 0.05.

    Returns:
        The path of the page.

    Raises:
        MissingDependencyError: when jinja2 or matplotlib is not installed.
        CheckpointError: when a place holds nothing to report, is damaged, or `out` holds other files.
    """
    check_installed()
    report = Report(gather(places), within)
    folder = Path(places[0]) / FOLDER if out is None else Path(out)
    _check_target(folder)
    with whole_folder(folder) as target:
        (target / PAGE).write_text(report.page(), encoding="utf-8")
        (target / NUMBERS).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        if figures:
            (target / FIGURES).mkdir()
            for drawing in report.drawings:
                (target / FIGURES / f"{drawing.name}.svg").write_text(drawing.svg(), encoding="utf-8")
                (target / FIGURES / f"{drawing.name}.png").write_bytes(drawing.png())
    return folder / PAGE


def _check_target(folder: Path) -> None:
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: give a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / NUMBERS).is_file():
        raise CheckpointError(f"{folder} holds other files than a report: give another folder by --out")


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
        found: what was gathered.
        within: as in `write_report`.
    """

    found: Gathered
    within: float | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.found.entries

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for entry in self.entries for name in entry.metrics))

    @cached_property
    def frontiers(self) -> list[Drawing]:
        return frontiers(self.entries)

    @cached_property
    def training(self) -> list[Drawing]:
        """Of distillations that belong to no model of the report."""
        return training_drawings(self.found.training, "")

    @cached_property
    def of_models(self) -> list[list[Drawing]]:
        """The figures of each model."""
        made = []
        for number, entry in enumerate(self.entries, 1):
            prefix = f"model-{number}-"
            made.append([*layer_drawings(entry, prefix), *training_drawings(entry.training, prefix)])
        return made

    @property
    def drawings(self) -> list[Drawing]:
        return [*self.frontiers, *(drawing for own in self.of_models for drawing in own), *self.training]

    @property
    def title(self) -> str:
        """The heading of the page."""
        if len(self.entries) == 1:
            return f"tdkit report: {self.entries[0].name}"
        models = ", ".join(dict.fromkeys(entry.record.model for entry in self.entries))
        return f"tdkit report: {len(self.entries)} models made of {models}" if models else "tdkit report: distillation"

    @property
    def choice(self) -> str:
        """Which model to take for a given loss; empty where there is nothing to choose from."""
        within = next(w for w in (self.within, self.found.within, WITHIN) if w is not None)
        records = [entry.record for entry in self.entries]
        return choose(records, within).text if len(records) > 1 and self.metrics else ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers of the report as JSON-able values."""
        return {
            "form": FORM,
            "choice": self.choice,
            "models": [
                {
                    "name": entry.name,
                    "place": str(entry.place),
                    "sentence": entry.sentence(),
                    "dense": _finite(entry.record.dense),
                    "compressed": _finite(entry.record.compressed),
                    "left_dense": [dict(zip(LEFT_DENSE, row, strict=True)) for row in left_dense(entry)],
                    "samples": [vars(sample) for sample in entry.record.samples],
                    "again": dict(_again(entry)),
                    "policy": entry.record.policy,
                    "unknown": list(entry.unknown),
                }
                for entry in self.entries
            ],
            "figures": {drawing.name: drawing.to_dict() for drawing in self.drawings},
            "notes": list(self.found.notes),
        }

    def page(self) -> str:
        """Returns the page as HTML."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(
            loader=PackageLoader("tdkit.reporting", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        return environment.get_template("page.html.j2").render(
            title=self.title,
            version=VERSION,
            ink=INK,
            faint=FAINT,
            light=SERIES,
            dark=DARK,
            sentence=self.entries[0].sentence() if len(self.entries) == 1 else "",
            choice=self.choice,
            columns=columns(self.metrics),
            rows=[entry.row(self.metrics) for entry in self.entries],
            notes=self.found.notes,
            frontiers=self.frontiers,
            parts=[_part(entry, own) for entry, own in zip(self.entries, self.of_models, strict=True)],
            training=self.training,
        )


TOLD = ("step", THEN)  # options that the rest of the page says
NO_REASON = "the reason was not recorded"
LEFT_DENSE = ("weight", "shape", "parameters", "why")


def left_dense(entry: Entry) -> list[tuple[str, str, str, str]]:
    """Returns every weight of a model that was not replaced, with its size and the reason."""
    plan = entry.record.plan
    if plan is None:
        return []
    rows = [
        (
            " = ".join(step.names),
            by(step.shape),
            f"{step.params_before:,}",
            NO_REASON if step.reason in ("", "dense") else step.reason,
        )
        for step in plan.steps
        if step.decomposition is None
    ]
    rows += [
        (" = ".join(weight.names), by(weight.shape), f"{weight.params:,}", f"cannot be rewritten: {weight.reason}")
        for weight in plan.untouchable
    ]
    return rows


def _part(entry: Entry, drawings: Sequence[Drawing]) -> dict[str, Any]:
    record, dense = entry.record, left_dense(entry)
    return {
        "entry": entry,
        "drawings": drawings,
        "unknown": entry.unknown,
        "warnings": record.plan.warnings if record.plan else (),
        "left_dense": dense,
        "left_dense_summary": _summary(entry, len(dense)),
        "before": render_tree(record.before),
        "after": render_tree(record.after),
        "again": _again(entry),
        "policy": yaml.safe_dump(record.policy, sort_keys=False) if record.policy else "",
    }


def _summary(entry: Entry, count: int) -> str:
    plan = entry.record.plan
    if plan is None:
        return "It is not known which weights were left dense."
    kept = plan.weights - sum(step.params_before for step in plan.rewritten)
    share = percent(kept / plan.weights if plan.weights else 0.0, up=True)
    return (
        f"{count} weights with {kept:,} parameters, {share} of all weights of two or more dimensions, were left dense."
    )


def _again(entry: Entry) -> list[tuple[str, str]]:
    """Returns what it takes to do a compression again, in pairs of name and value."""
    record = entry.record
    pairs = [("command", entry.again or "not known: it was made by a call in Python, or is not recorded")]
    pairs += [("model", record.model), ("seed", "none was given" if record.seed is None else str(record.seed))]
    pairs += [(name.replace("_", " "), str(value)) for name, value in record.options.items() if name not in TOLD]
    for data in record.data:
        used = "" if data.tokens is None else f", up to {data.tokens:,} tokens"
        pairs.append((f"{data.role} data", f"{data.name}{used}; SHA-256 {data.sha256 or 'not known'}"))
    pairs += [(f"{name} seconds", f"{value:.1f}") for name, value in record.seconds.items()]
    made = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    return [*pairs, ("versions", made or "not known")]


def _finite(figures: Any) -> dict[str, Any]:
    return {name: value if abs(value) < float("inf") else str(value) for name, value in figures.items()}
