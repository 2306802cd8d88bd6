"""`heal`: train a compressed model for a short time by the dense one, and keep the best weights on held-out rows."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tdkit.sources.models import load_model
from tdkit.support.devices import check_device
from torch import nn

from tdkit_distill.errors import HealingWarning, InterruptedRun
from tdkit_distill.healing.adapters import adapters
from tdkit_distill.healing.estimate import Estimate, Precision, placed
from tdkit_distill.healing.forecast import GENERATED, LOGITS, forecast, keep_precision
from tdkit_distill.healing.generated import Joined, generated_rows
from tdkit_distill.healing.report import Healing, measurements_of, perplexity
from tdkit_distill.healing.rows import Data, Rows, rows_of
from tdkit_distill.healing.settings import (
    MEASUREMENTS,
    PATIENCE,
    RANK,
    TOP_K,
    Method,
    Settings,
    check_options,
    context_of,
    generated_count,
    settings_of,
    token_count,
)
from tdkit_distill.loop.engine import distill
from tdkit_distill.loop.measure import model_loss
from tdkit_distill.teachers.cache import CachedTeacher, build_cache

SHARD = 1 << 15  # tokens of the teacher's logits that are written together, and are lost at most on Ctrl-C


class InterruptedHealing(InterruptedRun):
    """Healing was asked to stop; the model has the best weights so far.

    Attributes:
        healing: the report so far.
    """

    def __init__(self, message: str, healing: Healing) -> None:
        super().__init__(message)
        self.healing = healing


def stderr_line(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)


def heal(
    model: nn.Module,
    teacher: nn.Module | str | Path | None,
    data: Data,
    *,
    tokens: int | str = "200k",
    self_generated: int | str = 0,
    method: Method = "all",
    tokenizer: Any = None,
    context: int | None = None,
    held_out: Data | None = None,
    others: Sequence[str] | Mapping[str, Data] | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    losses: Mapping[str, Any] | None = None,
    rank: int = RANK,
    top_k: int | None = TOP_K,
    measurements: int = MEASUREMENTS,
    patience: int | None = PATIENCE,
    precision: Literal["auto", "no", "bf16"] = "auto",
    device: str | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    dry_run: bool = False,
    progress: bool | None = None,
    say: Callable[[str], None] = stderr_line,
) -> Healing:
    """Train a compressed model in place, so that it predicts what its dense model predicts.

    The model ends with the weights that were best on held-out rows, which may be those that it came with. Texts of
    other kinds are measured too, and a warning says when one gets worse.

    Args:
        model: any model with logits, compressed or not.
        teacher: the dense model, or its name or folder, of which only the logits are kept once they are computed. None
            trains by the labels.
        data: the name or path of a text, or several (with `tokenizer`); token ids (count, length); `Examples`, named
            columns or a ``TensorDataset`` with integer labels.
        tokens: to train on, over as many epochs as that takes.
        self_generated: how many of them are text that the teacher generates itself, beside `data`, which is a text or
            token ids. It holds off the loss of what the data do not use.
        method: what is trained: ``all`` but the embeddings; ``factors`` of factorised layers; or ``adapters``, low-rank
            updates of the dense layers (merged into them at the end), with the factors and norms.
        context: tokens per window of a text; 512 when None, or as many as the model takes.
        held_out: rows to measure on; a tenth of the data, at most 4,096 tokens, when None.
        others: texts of other kinds, or rows by name; Python's language reference and the source of its standard
            library when None.
        learning_rate: of AdamW after its warm-up, from where it falls along a cosine; that of the method when None.
        batch_size: rows per optimizer step; when None as many as leave 400 steps, at most 16.
        losses: as those of a `Stage`; when None the divergence from the teacher's logits and half of the labels' loss,
            or the latter alone without a teacher.
        rank: of the adapters.
        top_k: logits of the teacher that are kept; None runs the teacher beside the model.
        measurements: how many times the held-out rows are measured.
        patience: measurements without a new best after which training ends; None goes on.
        precision: of the forward: ``bf16``, ``no`` for that of the weights, or ``auto``: bfloat16 where it is faster.
        device: ``cpu`` or ``cuda``; when None, what there is.
        folder: of checkpoints; a later call with the same arguments goes on from there. None keeps nothing.
        dry_run: measure the time of a step, say what the run would take, and stop.
        say: how to tell what the run takes, before it starts.

    Returns:
        The report.

    Raises:
        OptionError: for an option that cannot be met.
        DataError, SourceError: for data that is not there or too short.
        CalibrationError: for `self_generated` with a teacher that does not generate text.
        InterruptedHealing: on Ctrl-C or SIGTERM while it trains, with the best weights so far in the model.
        StageError, VocabularyError, NotFiniteError, ResumeError, StorageError: as `distill`.
    """
    counts = {"batch_size": batch_size, "rank": rank, "top_k": top_k, "measurements": measurements}
    counts |= {"patience": patience, "context": context}
    check_options(model, method=method, precision=precision, counts=counts, learning_rate=learning_rate)
    wanted, place = token_count(tokens), _device(device)
    own = generated_count(self_generated, wanted, teacher is not None)
    length = context_of(model, context)
    rows = rows_of(
        data,
        model,
        tokenizer,
        tokens=wanted,
        generated=own,
        context=length,
        held_out=held_out,
        others=others,
        seed=seed,
    )
    for note in rows.not_measured:
        _warn(note)
    dense = load_model(str(teacher)).model if isinstance(teacher, str | Path) else teacher
    del teacher  # when it was a name, its weights go once its logits are kept
    with ExitStack() as stack:
        stack.callback(model.to, next(model.parameters()).device)
        model.to(place)
        if method == "adapters":
            stack.enter_context(adapters(model, rank, seed))
        settings = settings_of(
            model,
            rows.train,
            tokens=wanted,
            self_generated=own,
            method=method,
            learning_rate=learning_rate,
            batch_size=batch_size,
            losses=losses,
            has_teacher=dense is not None,
            rank=rank,
            top_k=top_k,
            measurements=measurements,
            patience=patience,
            seed=seed,
            device=place,
        )
        run = None if folder is None else Path(folder)
        estimate = forecast(model, dense, rows, settings, precision, place, run)
        say(f"healing: {estimate.text()}")
        if dry_run:
            return Healing((), 0, None, False, asdict(settings), estimate, rows.not_measured)
        if run is not None:
            keep_precision(run, estimate.precision)
        seen: dict[str, float] | None = None
        by: nn.Module | CachedTeacher | None = dense
        if dense is not None:
            kept = run or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with placed(dense, place):
                if rows.to_generate:
                    rows = _with_generated(dense, rows, settings, kept / GENERATED, estimate.precision, progress)
                with torch.autocast(place.type, torch.bfloat16, enabled=estimate.precision == "bf16"):
                    seen = _perplexities(dense, rows, settings, place)
                    if settings.top_k is not None:
                        by = _cache(dense, rows, settings, kept / LOGITS, progress)
        del dense
        made = _train(model, by, rows, settings, estimate, seen, run, place, progress)
    for warning in made.warnings:
        _warn(warning)
    return made


def _train(
    model: nn.Module,
    teacher: nn.Module | CachedTeacher | None,
    rows: Rows,
    settings: Settings,
    estimate: Estimate,
    seen: dict[str, float] | None,
    folder: Path | None,
    device: torch.device,
    progress: bool | None,
) -> Healing:
    options = {"precision": estimate.precision, "device": device.type, "evaluate_every": settings.evaluate_every}
    options |= {"keep": 1, "checkpoint_every": settings.evaluate_every if folder else None}
    if isinstance(teacher, nn.Module) and estimate.precision == "bf16":
        options["teacher_dtype"] = "bfloat16"
    message = ""
    try:
        history = distill(
            model,
            teacher,
            settings.stage(),
            rows.train,
            folder=None if folder is None else folder / "run",
            held_out=rows.held_out,
            seed=settings.seed,
            running=options,
            progress=progress,
        ).history
    except InterruptedRun as error:
        history, message = error.history, str(error)
    measured, kept = measurements_of(history, next(iter(rows.held_out)))
    made = Healing(measured, kept, seen, not message, asdict(settings), estimate, rows.not_measured)
    if message:
        what = f"the model has the best weights so far, those after {made.after.steps} steps"
        raise InterruptedHealing(f"{message}; {what}", made)
    return made


def _perplexities(teacher: nn.Module, rows: Rows, settings: Settings, device: torch.device) -> dict[str, float]:
    size = settings.batch_size // settings.accumulation
    return {
        name: perplexity(model_loss(teacher, part, device, batch=size, seed=settings.seed))
        for name, part in rows.held_out.items()
    }


def _cache(teacher: nn.Module, rows: Rows, settings: Settings, folder: Path, progress: bool | None) -> CachedTeacher:
    assert settings.top_k is not None
    size = settings.batch_size // settings.accumulation
    per_shard = max(1, SHARD // rows.train.length)
    return build_cache(
        teacher, rows.train, folder, k=settings.top_k, batch=size, rows_per_shard=per_shard, progress=progress
    )


def _with_generated(
    teacher: nn.Module, rows: Rows, settings: Settings, folder: Path, precision: Precision, progress: bool | None
) -> Rows:
    """The rows, with those to train on that the teacher generates."""
    own = generated_rows(
        teacher,
        rows.to_generate,
        rows.train.length,
        folder,
        precision=precision,
        seed=settings.seed,
        progress=progress,
    )
    return replace(rows, train=Joined(rows.train, own), to_generate=0)


def _device(device: str | None) -> torch.device:
    found = check_device(device)
    return found or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _warn(text: str) -> None:
    warnings.warn(text, HealingWarning, stacklevel=3)
