"""The models that a run of a recipe made: that of its steps together, and the candidates of its comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tdkit.planning.plan import Plan
from tdkit.planning.step import Step
from tdkit.recipes.recipe import steps as step_registry
from tdkit.records.record import Data, Record, Sample
from tdkit.reporting.entry import SIZES, Entry

MEASURED = (*SIZES, "perplexity")  # of an evaluate step


def entries_of_run(place: Path, state: Mapping[str, Any], records: Sequence[Record], again: str) -> list[Entry]:
    """Returns the models of a run.

    Args:
        place: the run folder.
        state: what its state file holds.
        records: of its compressions, in order.
        again: the command that runs it again.
    """
    results, steps = state["results"], state["recipe"]["steps"]
    done = [(next(iter(step)) if isinstance(step, Mapping) else step) for step in steps]
    compared = [record for record in records if _compares(str(record.options.get("step")))]
    chain = [record for record in records if record not in compared] or _kept(done, results, compared)
    found = [Entry(record, place, again) for record in compared]
    samples = [
        Sample(str(step["generate"].get("prompt", "")), result.get("dense"), result.get("compressed"))
        for step, result in zip(steps, results, strict=False)
        if isinstance(step, Mapping) and "generate" in step
    ]
    if chain:
        record = _together(chain)
        dense, after = _figures(done, results)
        record = replace(
            record,
            name=str(state["recipe"]["name"]),
            dense={**record.dense, **dense},
            compressed={**record.compressed, **after},
            policy=state["recipe"],
            data=(*record.data, *_training_text(state, record)),
        )
        found.insert(0, Entry(record, place, again))
    if found and samples:
        kept = min(found, key=lambda e: e.record.compressed.get("perplexity", 0.0)) if not chain else found[0]
        number = found.index(kept)
        found[number] = replace(kept, record=replace(kept.record, samples=tuple(samples)))
    return found


def _compares(kind: str) -> bool:
    """Returns whether a kind of step makes several models; a kind of a package that is not here counts as none."""
    return kind in step_registry.names() and step_registry.get(kind).compares


def _kept(kinds: Sequence[str], results: Sequence[Mapping[str, Any]], compared: Sequence[Record]) -> list[Record]:
    """Returns the model that a comparison went on with, where a later step changed it; else nothing."""
    changes = [n for n, kind in enumerate(kinds[: len(results)]) if step_registry.get(kind).changes_model]
    if not compared or not changes or _compares(kinds[changes[-1]]):
        return []
    names = [result["kept"] for kind, result in zip(kinds, results, strict=False) if _compares(kind)]
    found = next((record for record in reversed(compared) if record.name == names[-1]), None)
    if found is None:
        return []
    after = [kinds[number] for number in changes if number > max(n for n, k in enumerate(kinds) if _compares(k))]
    options = {"with": ", ".join([str(found.options.get("with", "")), *after])}
    return [replace(found, options={**found.options, **options}, seconds={})]


def _figures(kinds: Sequence[str], results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Returns what evaluate steps measured of the dense model, and after the last step that changes the model."""
    changes = [n for n, kind in enumerate(kinds[: len(results)]) if step_registry.get(kind).changes_model]
    first, last = (changes[0], changes[-1]) if changes else (len(results), -1)
    dense: dict[str, float] = {}
    after: dict[str, float] = {}
    for number, (kind, result) in enumerate(zip(kinds, results, strict=False)):
        if kind == "evaluate":
            figures = {name: float(result[name]) for name in MEASURED if result.get(name) is not None}
            if number < first:
                dense = figures
            elif number > last:
                after = figures
            beside = {name: float(result[f"dense_{name}"]) for name in MEASURED if result.get(f"dense_{name}")}
            dense = {**beside, **dense}
    return dense, after


def _training_text(state: Mapping[str, Any], record: Record) -> list[Data]:
    """Returns the training text of a recipe, which is read in parts and has no digest."""
    name = state["recipe"].get("data", {}).get("train")
    known = name is None or any(data.role == "train" for data in record.data)
    return [] if known else [Data("train", name if isinstance(name, str) else " + ".join(name))]


def _together(records: Sequence[Record]) -> Record:
    """Returns the record of several compressions of one model, one after the other."""
    first, last = records[0], records[-1]
    if len(records) == 1:
        return first
    steps: dict[str, Step] = {}
    for record in records:
        for step in record.plan.steps if record.plan else ():
            if step.decomposition is not None or step.name not in steps:
                known = steps.get(step.name)
                steps[step.name] = step if known is None or known.loss is None else replace(step, loss=known.loss)
    plan = last.plan and Plan(
        tuple(steps.values()),
        int(first.dense["params"]),
        int(last.compressed["params"]),
        last.plan.untouchable,
        last.plan.budget,
        tuple(text for record in records if record.plan for text in record.plan.warnings),
    )
    return replace(
        last,
        plan=plan,
        dense=first.dense,
        before=first.before,
        spectra=tuple(spectrum for record in records for spectrum in record.spectra),
        data=tuple(dict.fromkeys(each for record in records for each in record.data)),
    )
