"""Compress copies of one model by each of several policies and measure them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdkit.calibration.batches import Batch
from tdkit.calibration.calibration import Calibration, Loss
from tdkit.planning.policy import Policy
from tdkit.sweeps.grid import points_of
from tdkit.sweeps.run import Measure, Sweep, flat


def sweep(
    model: nn.Module,
    policies: Sequence[Policy] | Mapping[str, Policy] | Mapping[str, Sequence[Any]],
    *,
    match: str | Sequence[str] = "*",
    base: Policy | None = None,
    calibration: Calibration | Iterable[Batch] | str | Path | None = None,
    loss: Loss | None = None,
    measure: Measure | None = None,
    higher_is_better: Sequence[str] = (),
    sequential: bool = False,
    passes: int = 1,
    folder: str | Path | None = None,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    log_with: Sequence[str] = (),
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """Compress copies of a model by each of several policies, and measure the dense model and each result.

    The calibration is measured once, on all weights that any of the policies rewrites, and the error curve of a weight
    is computed once for each decomposition, however many budgets there are. With a folder, a sweep that was interrupted
    goes on when the call is repeated: points that are done are not done again, and a point that was killed is done
    anew.

    Args:
        model: any torch module; it is not changed.
        policies: a list of policies, or policies by name, or a grid, of which all combinations are points: ``{"with":
            ["low_rank", "auto"], "budget": [0.9, 0.8]}``. A grid varies ``with``, ``budget``, ``allocation`` and
            ``min_keep``.
        match: globs of the layers that a grid compresses.
        base: the policy that a grid varies, instead of `match`.
        calibration: a result of `tdkit.calibrate`, batches, or the name of a text, as in `tdkit.compress`.
        loss: as in `tdkit.compress`.
        sequential: as in `tdkit.compress`.
        passes: as in `tdkit.compress`.
        device: as in `tdkit.compress`.
        measure: a function model -> figures by name, such as ``lambda m: {"accuracy": score(m, batches)}``.
        higher_is_better: the figures of which more is better; of all others less is.
        folder: where records of the points are kept, for `tdkit report` and to go on.
        overwrite: discard an earlier sweep in `folder`.
        log_with: trackers as accelerate names them, such as "tensorboard", which are given the figures of each point.
        progress: show progress bars; when None, only on a terminal.

    Returns:
        A flat dictionary per point, in order, of which ``pandas.DataFrame`` makes a table: ``name``, what varied,
        ``params``, ``ratio``, ``bytes``, ``bytes_ratio``, the figures, the same of the dense model under ``dense_``,
        and ``seconds``. A policy that cannot be carried out has the reason under ``failure`` and no figures.

    Raises:
        OptionError: when there is no point, or a grid or a tracker is unknown.
        PolicyError, CalibrationError: as in `tdkit.plan`, before any work; the message names the point.
        CheckpointError: when `folder` holds other files, or a sweep of another model, calibration or options.
    """
    run = Sweep(
        model,
        points_of(policies, base, match),
        calibration=calibration,
        loss=loss,
        measure=measure,
        higher_is_better=higher_is_better,
        sequential=sequential,
        passes=passes,
        folder=None if folder is None else Path(folder),
        device=device,
        log_with=log_with,
        progress=progress,
    )
    run.prepare(overwrite=overwrite)
    found = dict(run.points_as_done())
    run.finish()
    return [flat(point, found[point.name]) for point in run.points]
