"""``tdkit compress --stream``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tdkit.calibration.calibration import Calibration
from tdkit.cli.moments import Wanted
from tdkit.cli.output import note, settings
from tdkit.compression.stream import compress_folder, resolve_on_disk
from tdkit.compression.work import Work
from tdkit.errors import OptionError
from tdkit.models.card import Card
from tdkit.models.checkpoint.reading import outline
from tdkit.planning.plan import Plan
from tdkit.planning.planner import applied_plan, planned
from tdkit.planning.policy import Policy
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
        )
    except KeyboardInterrupt:
        settings.kept = f"the finished layers are kept in {Work(out).folder}: the same call goes on after them"
        raise
    note(f"saved to {out}")
    return applied_plan(outline(out))
