"""``tdkit compress --stream``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tdkit.calibration.calibration import Calibration
from tdkit.cli.moments import Wanted
from tdkit.cli.output import note, settings
from tdkit.cli.reports import command_line
from tdkit.compression.stream import compress_folder, resolve_on_disk
from tdkit.compression.work import Work
from tdkit.errors import OptionError
from tdkit.models.card import Card
from tdkit.models.checkpoint.reading import outline
from tdkit.planning.plan import Plan
from tdkit.planning.planner import applied_plan, planned
from tdkit.planning.policy import Policy
from tdkit.records.before import carried_out, sizes_of
from tdkit.records.record import RECORD, Data, Record
from tdkit.records.tree import tree_of
from tdkit.sources.on_disk import open_model


def compress_streamed(
    model: str,
    policy: Policy,
    out: Path,
    wanted: Wanted,
    others: Mapping[str, bool],
    dtype: torch.dtype,
    device: str | None,
    workers: int,
    overwrite: bool,
    card: Card,
    dry_run: bool,
) -> Plan:
    """Compress a folder layer by layer and return the plan that was carried out, or would be.

    Raises:
        OptionError: when an option is given that needs the whole model.
    """
    for option, is_given in others.items():
        if is_given:
            raise OptionError(f"{option} runs the whole model and goes without --stream only")
    moments = wanted.saved()
    if moments is None and (wanted.texts is not None or wanted.data is not None):
        raise OptionError(
            "--stream takes saved moments: write them with tdkit calibrate MODEL --stream --text TEXT --out MOMENTS, "
            "and give --calibration MOMENTS"
        )
    if dry_run:
        opened = open_model(model, dtype=dtype)
        known = None if moments is None else Calibration.load(moments)
        return planned(resolve_on_disk(opened, policy), known)
    plans: list[Plan] = []
    try:
        compress_folder(
            model,
            policy,
            out,
            calibration=moments,
            dtype=dtype,
            device=device,
            workers=workers,
            overwrite=overwrite,
            card=card,
            on_plan=plans.append,
        )
    except KeyboardInterrupt:
        settings.kept = f"the finished layers are kept in {Work(out).folder}: the same call goes on after them"
        raise
    note(f"saved to {out}")
    return _recorded(plans[0], model, policy, out, moments, dtype, device)


def _recorded(
    made: Plan, name: str, policy: Policy, out: Path, moments: Path | None, dtype: torch.dtype, device: str | None
) -> Plan:
    """Write the record of a streamed compression and return the plan that was carried out."""
    dense, model = open_model(name, dtype=dtype).model, outline(out)
    plan = carried_out(made, applied_plan(model))
    record = Record(
        name=out.name,
        model=name,
        class_name=type(model).__name__,
        policy=policy.to_dict(),
        options={"stream": True, "dtype": str(dtype).removeprefix("torch."), "device": device or "cpu"},
        command=command_line(),
        data=() if moments is None else (Data("calibration", f"moments in {moments}"),),
        plan=plan,
        before=tuple(tree_of(dense)),
        after=tuple(tree_of(model)),
        dense=sizes_of(dense),
        compressed=sizes_of(model),
        unknown=("no singular values are recorded: the layers were read and fitted one by one (--stream)",),
    )
    record.save(out / RECORD)
    return plan
