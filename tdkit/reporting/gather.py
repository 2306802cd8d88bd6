"""Read what lies in folders: saved models, runs of recipes, sweeps, logs of distillation, evaluation reports."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tdkit.errors import CheckpointError, TdkitError
from tdkit.evaluation.reports import Report
from tdkit.models.checkpoint import is_saved, read_description
from tdkit.models.checkpoint.reading import outline
from tdkit.planning.planner import applied_plan
from tdkit.recipes.recipe import RECIPE_FILE, RECORDS, STATE
from tdkit.records.before import sizes_of
from tdkit.records.record import RECORD, Record
from tdkit.records.tree import tree_of
from tdkit.reporting.entry import Entry, Training
from tdkit.reporting.runs import entries_of_run
from tdkit.support.documents import parse_json, read_json
from tdkit.sweeps.folder import POINTS, SWEEP

LOG = "log.jsonl"  # of the package tdkit-distill
HEALING = "run"  # the folder of the log in that of a heal step
EVALUATION = "tdkit-evaluation/1"

NO_RECORD = (
    f"the folder holds no {RECORD}, which tdkit compress, run and sweep write: the dense model, the policy, the "
    "estimates and the reasons why weights were left dense are not known"
)
NOT_MEASURED = (
    "the quality was not measured: give tdkit compress --evaluation TEXT, or write a report of tdkit eval --out "
    "FILE.json on the dense and the compressed model and give both files to tdkit report"
)


@dataclass(frozen=True)
class Gathered:
    """All that was found.

    Attributes:
        entries: the compressed models.
        training: losses of distillations that belong to none of them.
        notes: what was left out and why.
        within: the loss for which a sweep was asked to choose a point, as a fraction; None without a sweep.
    """

    entries: tuple[Entry, ...]
    training: tuple[Training, ...] = ()
    notes: tuple[str, ...] = ()
    within: float | None = None


def gather(places: Sequence[str | Path]) -> Gathered:
    """Read folders, and files with evaluation reports.

    Raises:
        CheckpointError: when a place does not exist, or holds nothing to report.
    """
    entries: list[Entry] = []
    loose: list[Training] = []
    notes: list[str] = []
    reports: list[tuple[Path, Report]] = []
    within = None
    for place in map(Path, places):
        if not place.exists():
            raise CheckpointError(
                f"{place} does not exist: give folders that tdkit wrote, or files of tdkit eval --out"
            )
        if place.is_file():
            reports.append((place, Report.read(place)))
            continue
        reports += _reports_in(place)
        training = trainings(place)
        found = _entries_in(place)
        if (place / SWEEP).is_file():
            within = _json(place / SWEEP).get("within", within)
        if not found and not training:
            raise CheckpointError(
                f"{place} holds no saved model, run, sweep or {LOG}: give one that tdkit compress, run or sweep wrote"
            )
        if len(found) >= 1 and training:
            found[0] = replace(found[0], training=tuple(training))
        elif training:
            loose += training
        entries += found
    entries, others = _with_reports(entries, reports)
    notes += others
    return Gathered(tuple(map(_told, _named_apart(entries))), tuple(loose), tuple(notes), within)


def _entries_in(place: Path) -> list[Entry]:
    if (place / SWEEP).is_file():
        files = sorted((place / POINTS).glob("*.json"))
        again = _json(place / SWEEP).get("command")
        records = [Record.read(file) for file in files]
        return [Entry(each, place, each.command or again) for each in _by_size(records)]
    if (place / STATE).is_file() and (place / RECIPE_FILE).is_file():
        records = [Record.read(file) for file in sorted((place / RECORDS).glob("*.json"))]
        again = f"tdkit run {shlex.quote(str(place / RECIPE_FILE))} --out {shlex.quote(str(place))}-again"
        found = entries_of_run(place, _json(place / STATE), records, again)
        if not found and not trainings(place):
            raise CheckpointError(
                f"{place} is a run without records of a compression: its recipe compresses nothing, has not got there, "
                "or was run by an earlier version of tdkit"
            )
        return found
    if (place / RECORD).is_file():
        record = Record.read(place / RECORD)
        return [Entry(record, place, record.command)]
    return [_of_folder(place)] if is_saved(place) else []


def _by_size(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (str(r.options.get("with", "")), -r.compressed.get("params", 0), r.name))


def _of_folder(place: Path) -> Entry:
    """Returns what a saved folder without a record says about itself."""
    description = read_description(place)
    kind = str(description["model"].get("class"))
    record = Record(name=place.name, model=str(place), class_name=kind.rpartition(".")[2], versions={})
    try:
        model = outline(place)
    except TdkitError as error:
        return Entry(record, place, unknown=(NO_RECORD, f"the layers are not known either: {error}"))
    plan = applied_plan(model)
    record = replace(
        record, plan=plan, after=tuple(tree_of(model)), compressed=sizes_of(model), dense={"params": plan.params_before}
    )
    return Entry(record, place, unknown=(NO_RECORD,))


def trainings(place: Path) -> list[Training]:
    """Returns the losses in the logs of distillation in a folder and in those of its steps."""
    found = []
    for log in sorted(log for glob in (LOG, f"*/{LOG}", f"*/{HEALING}/{LOG}") for log in place.glob(glob)):
        stages: dict[str, dict[str, list[tuple[int, float]]]] = {}
        held_out: list[tuple[int, float]] = []
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                entry = parse_json(line)
                total = int(entry["total"])
                if "held_out" in entry:
                    held_out.append((total, float(entry["held_out"])))
                    continue
                terms = stages.setdefault(str(entry["stage"]), {})
                for name, value in {"loss": entry["loss"], **entry["terms"]}.items():
                    terms.setdefault(name, []).append((total, float(value)))
            except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while it wrote
                continue
        if stages:
            folder = log.parent.parent if log.parent.name == HEALING else log.parent
            found.append(Training(folder.name, stages, held_out))
    return found


def _reports_in(place: Path) -> list[tuple[Path, Report]]:
    found = []
    for file in sorted(place.glob("*.json")):
        try:
            form = read_json(file)
        except (OSError, ValueError):
            continue
        if isinstance(form, Mapping) and form.get("form") == EVALUATION:
            found.append((file, Report.read(file)))
    return found


def _with_reports(entries: list[Entry], reports: list[tuple[Path, Report]]) -> tuple[list[Entry], list[str]]:
    """Add the figures of evaluation reports to the models that they are about; returns notes on the others."""
    notes = []
    for file, report in reports:
        figures = {
            f"{result.task} {name}": figure.value
            for result in report.results
            for name, figure in result.figures.items()
        }
        name, used = report.model.name, False
        for number, entry in enumerate(entries):
            record = entry.record
            if _same(name, entry.place) and report.model.decompositions:
                record = replace(record, compressed={**record.compressed, **figures})
            elif not report.model.decompositions and (_same(name, Path(record.model)) or name == record.model):
                record = replace(record, dense={**record.dense, **figures})
            else:
                continue
            entries[number], used = replace(entry, record=record), True
        if not used:
            notes.append(f"{file}: the evaluation of {name} belongs to none of the models of this report")
    return entries, notes


def _same(name: str, place: Path) -> bool:
    return Path(name).exists() and place.exists() and Path(name).samefile(place)


def _told(entry: Entry) -> Entry:
    """Add what is not known of a model."""
    record, unknown = entry.record, [*entry.record.unknown, *entry.unknown]
    if record.failure:
        return replace(entry, unknown=tuple(unknown))
    if not entry.metrics:
        unknown.append(NOT_MEASURED)
    elif not any(name in record.dense for name in entry.metrics):
        unknown.append("the quality of the dense model was not measured")
    if record.plan is not None and all(step.loss is None for step in record.plan.rewritten):
        unknown.append("no loss was estimated: that takes a calibration with gradients and a budget")
    if not record.spectra and not any("singular values" in text for text in unknown):
        unknown.append("no singular values are recorded, which takes the dense weights at the time of the compression")
    if not record.samples:
        unknown.append("no text was continued: give tdkit compress --prompt TEXT, or put a generate step in the recipe")
    return replace(entry, unknown=tuple(dict.fromkeys(unknown)))


def _named_apart(entries: list[Entry]) -> list[Entry]:
    """Give models of one name their place as well."""
    names = [entry.name for entry in entries]
    return [
        entry
        if names.count(entry.name) == 1
        else replace(entry, record=replace(entry.record, name=f"{entry.name} ({entry.place})"))
        for entry in entries
    ]


def _json(file: Path) -> dict[str, Any]:
    try:
        form = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(form, dict):
        raise CheckpointError(f"{file} is damaged: it is no JSON object")
    return form
