"""What a run of healing will take, told before it starts, and the precision that it is run in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from tdkit.models.sites import num_bytes, num_params
from tdkit.support.documents import read_json
from tdkit.support.files import write_text
from torch import nn

from tdkit_distill.errors import ResumeError
from tdkit_distill.healing.estimate import Estimate, Precision, Speed, placed, speed_of
from tdkit_distill.healing.generated import generation_cost, windows_left
from tdkit_distill.healing.rows import Rows
from tdkit_distill.healing.settings import Settings
from tdkit_distill.loop.checkpoints import checkpoints
from tdkit_distill.loop.stages import trainable_names
from tdkit_distill.teachers.cache import rows_kept

CHOICE = "precision.json"
LOGITS, GENERATED = "teacher", "generated"  # folders in that of a run
PAYS = 1.2  # how much faster bfloat16 must be on a CPU to be taken
FULL = 4  # bytes of a gradient, and of each of the two moments, of a parameter


def forecast(
    model: nn.Module,
    teacher: nn.Module | None,
    rows: Rows,
    settings: Settings,
    precision: Literal["auto", "no", "bf16"],
    device: torch.device,
    folder: Path | None,
) -> Estimate:
    """Time a step, choose the precision unless it is given, and add up what the run will take.

    Args:
        folder: of the run; one that was interrupted keeps its precision.

    Raises:
        ResumeError: when the run in the folder has another precision than is asked for.
    """
    trained = trainable_names(model, settings.trainable, f"method '{settings.method}'")
    size = settings.batch_size // settings.accumulation

    def speed(kind: Precision) -> Speed:
        return speed_of(model, rows.train, size, trained, kind, device)

    chosen, found = _precision(precision, device, folder, speed)
    all_rows = len(rows.train) + rows.to_generate
    steps = settings.stage().step_count(rows.train.length)
    done = _steps_done(folder)
    per_step = settings.batch_size * rows.train.length
    aside = sum(len(part) * part.length for part in rows.held_out.values())
    seconds = (steps - done) * per_step * found.step
    seconds += (1 + (steps - done) / settings.evaluate_every) * aside * found.forward
    count = sum(p.numel() for name, p in model.named_parameters() if name in trained)
    memory = num_bytes(model) + 3 * FULL * count + found.activations
    disk = 0
    if teacher is not None:
        took, held = 0.0, 0
        with placed(teacher, device):
            once = speed_of(teacher, rows.train, size, set(), chosen, device)
            left = windows_left(None if folder is None else folder / GENERATED, rows.to_generate)
            if left:
                took, held = generation_cost(teacher, left, rows.train.length, chosen)
        known = 0 if folder is None else min(rows_kept(folder / LOGITS), all_rows)
        asked = (all_rows - known) * rows.train.length if settings.top_k else (steps - done) * per_step
        computed = aside + asked
        seconds += computed * once.forward + took
        memory = num_bytes(teacher) + (memory if settings.top_k is None else max(memory, num_bytes(model) + held))
        disk += (settings.top_k or 0) * 8 * all_rows * rows.train.length
    if folder is not None:
        disk += 2 * (num_bytes(model) + 2 * FULL * count) + 2 * FULL * count
    return Estimate(
        tokens=settings.tokens,
        generated=rows.to_generate * rows.train.length,
        steps=steps,
        steps_done=done,
        trained=count,
        params=num_params(model),
        seconds=seconds,
        tokens_per_second=1 / found.step,
        memory=memory,
        disk=disk if folder is not None else 0,
        precision=chosen,
    )


def keep_precision(folder: Path, precision: Precision) -> None:
    """Write down the precision of a run, so that it goes on in the same one."""
    write_text(folder / CHOICE, json.dumps({"precision": precision}) + "\n")


def _precision(
    asked: Literal["auto", "no", "bf16"], device: torch.device, folder: Path | None, speed: Callable[[Precision], Speed]
) -> tuple[Precision, Speed]:
    kept = _kept(folder)
    if kept is not None:
        if asked not in ("auto", kept):
            raise ResumeError(f"the run in {folder} has precision {kept}: give precision='{kept}', or another folder")
        return kept, speed(kept)
    if asked == "auto":
        chosen, found = _faster(device, speed)
    else:
        chosen, found = asked, speed(asked)
    return chosen, found


def _faster(device: torch.device, speed: Callable[[Precision], Speed]) -> tuple[Precision, Speed]:
    if device.type == "cuda":
        chosen: Precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        return chosen, speed(chosen)
    full, half = speed("no"), speed("bf16")
    return ("bf16", half) if full.step > PAYS * half.step else ("no", full)


def _kept(folder: Path | None) -> Precision | None:
    file = None if folder is None else folder / CHOICE
    if file is None or not file.exists():
        return None
    try:
        form = read_json(file)
    except (OSError, ValueError) as error:
        raise ResumeError(f"{file} is damaged ({error}): delete it, and the precision is chosen anew") from None
    known = form.get("precision") if isinstance(form, dict) else None
    if known not in get_args(Precision):
        raise ResumeError(f"{file} is damaged: it holds no precision: delete it, and the precision is chosen anew")
    return cast(Precision, known)


def _steps_done(folder: Path | None) -> int:
    found = checkpoints(folder / "run") if folder is not None else []
    return int(found[-1].name.removeprefix("step-")) if found else 0
