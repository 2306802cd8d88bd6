"""The record of a model that a further step was made of: healing, rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tdkit.errors import CheckpointError
from tdkit.planning.planner import applied_plan
from tdkit.records.before import carried_out, sizes_of
from tdkit.records.record import PACKAGES, RECORD, THEN, Data, Figures, Record
from tdkit.records.tree import tree_of
from tdkit.support.version import installed_versions

UNRECORDED = (
    "{source} was compressed without a record: the call that made it, its policy, the estimates and the reasons why "
    "weights were left dense are not known"
)


def record_of(model: nn.Module, source: str, folder: str | Path | None = None) -> Record:
    """Returns the record in the folder of a model, or, where there is none, what the model shows of itself.

    Args:
        model: dense or compressed.
        source: its name.
        folder: that it was loaded from; None for none.
    """
    place = None if folder is None else Path(folder) / RECORD
    unknown = UNRECORDED.format(source=source)
    if place is not None and place.is_file():
        try:
            return Record.read(place)
        except CheckpointError as error:
            unknown = str(error)
    plan = applied_plan(model)
    shown = Record(name=source, model=source, class_name=type(model).__name__)
    if not plan.rewritten and plan.params_before == plan.params_after:
        return replace(shown, before=tuple(tree_of(model)), dense=sizes_of(model))
    return replace(shown, plan=plan, dense={"params": plan.params_before}, unknown=(unknown,))


def followed(
    record: Record,
    model: nn.Module,
    *,
    name: str,
    then: str,
    command: str | None = None,
    seed: int | None = None,
    data: Sequence[Data] = (),
    dense: Figures | None = None,
    compressed: Figures | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Record:
    """Returns the record of a model after a further step; what was measured of the model before the step is left out.

    Args:
        record: of the model before the step; see `record_of`.
        model: after it.
        name: of the new model.
        then: what was done, such as "rounded to 8 bits".
        command, seed, data, seconds: of the step, as in `Record`; they are added to those before.
        dense: what the step measured of the dense model.
        compressed: what was measured of the new model, besides its sizes.
    """
    plan = applied_plan(model)
    steps: list[Any] = [*record.options.get(THEN, ()), then]
    return replace(
        record,
        name=name,
        options={**record.options, THEN: steps},
        seed=record.seed if seed is None else seed,
        command=" && ".join(each for each in (record.command, command) if each) or None,
        versions=installed_versions(PACKAGES),
        data=(*record.data, *data),
        plan=plan if record.plan is None else carried_out(record.plan, plan),
        after=tuple(tree_of(model)),
        dense={**record.dense, **(dense or {})},
        compressed={**sizes_of(model), **(compressed or {})},
        samples=tuple(replace(each, compressed=None) for each in record.samples),
        seconds={**record.seconds, **(seconds or {})},
    )
