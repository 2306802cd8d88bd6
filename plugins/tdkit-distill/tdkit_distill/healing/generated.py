"""Rows of text that the teacher generates itself, to heal on beside a text of one kind."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tdkit.calibration.self_generated import first_token_of, self_generated
from tdkit.models.sites import num_bytes
from tdkit.support.files import whole_file
from torch import Tensor, nn

from tdkit_distill.data.examples import Batch, Examples, Windows
from tdkit_distill.data.lock import exclusive
from tdkit_distill.data.order import mixed_seed
from tdkit_distill.errors import ResumeError, StorageError
from tdkit_distill.healing.estimate import Precision
from tdkit_distill.teachers.cache import model_digest

TOGETHER = 64  # windows: a token of each costs little more than one of a single window


class Joined(Examples):
    """The rows of several examples, one after the other, each with the same entries."""

    def __init__(self, *parts: Examples) -> None:
        self.parts = parts
        self.fixed = all(part.fixed for part in parts)
        self.fingerprint = hashlib.sha256("+".join(part.fingerprint for part in parts).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def length(self) -> int:
        return self.parts[0].length

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        places, pieces, start = [], [], 0
        for part in self.parts:
            here = ((rows >= start) & (rows < start + len(part))).nonzero().flatten()
            if len(here):
                places.append(here)
                pieces.append(part.batch(rows[here] - start, generator))
            start += len(part)
        back = torch.cat(places).argsort()
        return {name: torch.cat([piece[name] for piece in pieces])[back] for name in pieces[0]}


def generated_rows(
    teacher: nn.Module,
    count: int,
    length: int,
    folder: Path,
    *,
    precision: Precision,
    seed: int,
    progress: bool | None = None,
) -> Examples:
    """Windows that the teacher generates from nothing but its first token, at temperature 1.

    Args:
        teacher: on the device that it generates on.
        count: how many windows.
        length: tokens per window.
        folder: where they are kept; those that are there already are only read.
        precision: ``bf16`` generates by a copy of the teacher in bfloat16.

    Raises:
        CalibrationError: when the teacher does not generate text.
        ResumeError: when a file in the folder is damaged, or of something else.
        StorageError: when the disk is full; what was written stays and is used the next time.
    """
    key = f"{model_digest(teacher)} {length} {precision} {seed}"
    files = _files(folder, count)
    writer: nn.Module | None = None
    with exclusive(folder):
        folder.mkdir(exist_ok=True)
        for number, (path, size) in enumerate(files.items()):
            if not path.exists():
                writer = writer or _in_precision(teacher, precision)
                ids = self_generated(
                    writer,
                    size * length,
                    context=length,
                    seed=mixed_seed(seed, "generated", number) % 2**31,
                    together=TOGETHER,
                    progress=progress,
                )
                _write(path, ids, key)
        return Windows(torch.cat([_read(path, size, key) for path, size in files.items()]))


def windows_left(folder: Path | None, count: int) -> int:
    """How many of so many windows are not in the folder yet."""
    return count if folder is None else sum(n for path, n in _files(folder, count).items() if not path.exists())


def _files(folder: Path, count: int) -> dict[Path, int]:
    """The files of so many windows, and how many of them each holds."""
    starts = range(0, count, TOGETHER)
    return {
        folder / f"windows-{number:05d}.safetensors": min(TOGETHER, count - start)
        for number, start in enumerate(starts)
    }


def generation_cost(teacher: nn.Module, count: int, length: int, precision: Precision) -> tuple[float, int]:
    """Seconds that `count` windows take, and the bytes of the teacher's copy and of its keys and values.

    One token after half a window is timed, of as many windows as are generated together.

    Raises:
        CalibrationError: when the teacher does not generate text.
    """
    first, together = first_token_of(teacher), min(count, TOGETHER)
    writer: Any = _in_precision(teacher, precision)
    tokens = torch.full((1, max(length // 2, 1)), first, device=next(writer.parameters()).device)
    with torch.inference_mode():
        cache: Any = getattr(writer(input_ids=tokens, use_cache=True), "past_key_values", None)
        options = {}
        if callable(getattr(cache, "batch_repeat_interleave", None)):
            cache.batch_repeat_interleave(together)
            options = {"past_key_values": cache}
        tokens = tokens[:, :1].expand(together, -1)
        started = time.perf_counter()
        writer(input_ids=tokens, use_cache=True, **options).logits.float().softmax(-1)[0, 0, 0].item()
        seconds = time.perf_counter() - started
    layers = getattr(cache, "layers", None) or ()
    held = sum(tensor.nbytes for layer in layers for tensor in _tensors(layer))
    copied = num_bytes(writer) if writer is not teacher else 0
    return -(-count // TOGETHER) * length * seconds, 2 * held + copied


def _tensors(layer: Any) -> Iterator[Tensor]:
    for name in ("keys", "values"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor):
            yield tensor


def _in_precision(teacher: nn.Module, precision: Precision) -> nn.Module:
    return copy.deepcopy(teacher).to(torch.bfloat16) if precision == "bf16" else teacher


def _write(path: Path, ids: Tensor, key: str) -> None:
    try:
        with whole_file(path) as target:
            save_file({"ids": ids.to(torch.int32).contiguous()}, target, metadata={"key": key})
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path} could not be written ({error}): free some space and heal again; the windows before it are kept"
        ) from error


def _read(path: Path, size: int, key: str) -> Tensor:
    remedy = f"delete {path.parent}, and its windows are generated again"
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("key")
            ids: Tensor = file.get_tensor("ids").long()
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path} is damaged ({error}): {remedy}") from None
    if found != key or len(ids) != size:
        raise ResumeError(f"{path} holds windows of another teacher, length, precision, number or seed: {remedy}")
    return ids
