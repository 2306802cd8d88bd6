"""Teacher logits computed once: the k largest of each position in safetensors shards, verified when read."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tdkit.support.documents import read_json
from tdkit.support.files import digest_of_file, whole_file, write_text
from tdkit.support.progress import progress_bar
from torch import Tensor, nn

from tdkit_distill.data.examples import Examples
from tdkit_distill.data.lock import exclusive
from tdkit_distill.errors import CacheError, StorageError
from tdkit_distill.losses.chunked import top_logits
from tdkit_distill.models.calls import Call, call_model
from tdkit_distill.models.view import TopLogits, View
from tdkit_distill.teachers.live import live_teacher

FORMAT = 1
MANIFEST = "teacher.json"
SHARD_BYTES = 256 << 20
OPEN_SHARDS = 64  # a process may have about a thousand files open


class CachedTeacher:
    """Reads the logits of `build_cache`, row by row from memory-mapped shards.

    A shard's SHA-256 is checked when it is first opened. At most `OPEN_SHARDS` are mapped at once, and none is held
    in memory: the operating system keeps what it has room for.

    Args:
        folder: of a finished cache.

    Raises:
        CacheError: when there is no cache, or it is unfinished; when a shard that is read is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._form = _read_manifest(self.folder)
        if self._form["finished"] < self._form["shards"]:
            raise CacheError(
                f"{self.folder} holds {self._form['finished']} of {self._form['shards']} shards: build the cache again "
                "to finish it"
            )
        self._open: OrderedDict[int, Any] = OrderedDict()  # the last one was used last
        self._verified: set[int] = set()

    @property
    def data(self) -> str:
        """Fingerprint of the examples it was computed on."""
        return str(self._form["key"]["data"])

    @property
    def vocabulary(self) -> int:
        """How many logits the teacher has."""
        return int(self._form["vocabulary"])

    def view(self, batch: Mapping[str, Tensor], rows: Tensor) -> View:
        """The stored logits of these rows; all of them, in order, when k was the whole vocabulary."""
        per_shard = int(self._form["rows_per_shard"])
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self._form["rows"]:
            raise CacheError(f"{self.folder} holds {self._form['rows']} rows, not row {int(rows.max())}")
        found: dict[str, list[Tensor]] = {"values": [], "indices": [], "log_partition": []}
        for row in rows.tolist():
            shard = self._shard(row // per_shard)
            for name, pieces in found.items():
                pieces.append(shard.get_slice(name)[row % per_shard])
        device = next(iter(batch.values())).device
        values, indices, partition = (torch.stack(pieces).to(device) for pieces in found.values())
        if values.shape[-1] == self.vocabulary:
            return View(torch.empty_like(values).scatter_(-1, indices.long(), values))
        return View(
            TopLogits(
                values.flatten(0, -2),
                indices.flatten(0, -2),
                partition.flatten(),
                float(self._form["key"]["temperature"]),
                self.vocabulary,
            )
        )

    def _fault(self, shard: Any, number: int) -> str | None:
        """Returns what is wrong with the tensors of a shard, or None."""
        rows = min(self._form["rows_per_shard"], self._form["rows"] - number * self._form["rows_per_shard"])
        found = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118, not a dict
        if found.keys() != {"values", "indices", "log_partition"}:
            return f"it holds {', '.join(sorted(found))}"
        shape = (rows, *found["log_partition"].shape[1:])
        for name, tensor in found.items():
            inner = tensor.shape if name == "log_partition" else tensor.shape[:-1]
            if tuple(inner) != shape or (name != "indices") != tensor.is_floating_point():
                return f"{name} is {tuple(tensor.shape)} {tensor.dtype}"
        indices = found["indices"]
        if indices.shape != found["values"].shape:
            return "values and indices have different shapes"
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.vocabulary:
            return f"an index is outside of {self.vocabulary} logits"
        return None

    def _shard(self, number: int) -> Any:
        """A shard's file, memory-mapped, as ``safetensors.safe_open`` gives it."""
        if number not in self._open:
            path = _shard_path(self.folder, number)
            remedy = "delete it and build the cache again, which computes only what is missing"
            if not path.is_file():
                raise CacheError(f"{path} is missing: build the cache again, which computes only what is missing")
            if number not in self._verified and digest_of_file(path) != self._form["digests"][str(number)]:
                raise CacheError(f"{path} is damaged (its SHA-256 is not the one written down): {remedy}")
            try:
                self._open[number] = safe_open(path, framework="pt")
                fault = self._fault(self._open[number], number)
            except (OSError, SafetensorError) as error:
                raise CacheError(f"{path} cannot be read ({error}): {remedy}") from None
            if fault is not None:
                del self._open[number]
                raise CacheError(f"{path} is damaged ({fault}): {remedy}")
            self._verified.add(number)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def build_cache(
    teacher: nn.Module,
    examples: Examples,
    folder: str | Path,
    *,
    k: int,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    rows_per_shard: int | None = None,
    call: Call = call_model,
    progress: bool | None = None,
) -> CachedTeacher:
    """Store, for every row of `examples`, the teacher's `k` largest logits and the log-partition of all.

    Several processes may call this for one folder, those of one run or of several: one of them computes and writes
    while the others wait, and then only open what is there. When it fails or is killed, the next one goes on from
    its last shard. No process waits for another inside a collective operation.

    Args:
        teacher: run in eval and inference mode.
        folder: an unfinished cache of the same teacher, rows and settings is finished, a whole one only opened.
        k: logits per position; the vocabulary's size keeps everything.
        temperature: at which the log-partition is taken: that of the loss.
        dtype: of the stored logits.
        batch: rows per forward.
        rows_per_shard: None makes shards of about 256 MiB.

    Raises:
        CacheError: when the folder holds the cache of something else, or the rows are drawn at random.
        StorageError: when the disk is full; what was written stays and is used the next time.
    """
    folder = Path(folder)
    if not examples.fixed:
        raise CacheError("these rows are masked anew each time, so the teacher's answer cannot be kept: use it live")
    key = {
        "teacher": model_digest(teacher),
        "data": examples.fingerprint,
        "k": k,
        "temperature": temperature,
        "dtype": str(dtype).removeprefix("torch."),
    }
    form = _manifest_of(folder, key)
    if form is not None and not _missing(folder, form):
        return CachedTeacher(folder)  # which may lie where nothing can be written
    with exclusive(folder):
        form = _manifest_of(folder, key) or _new_manifest(folder, key, teacher, examples, rows_per_shard, dtype, call)
        missing = _missing(folder, form)  # another process may have written some meanwhile
        per_shard = form["rows_per_shard"]
        with live_teacher(teacher, call=call) as live, progress_bar("teacher", len(missing), progress) as bar:
            for number in missing:
                start, stop = number * per_shard, min((number + 1) * per_shard, len(examples))
                shard = _compute(live, examples, start, stop, batch, k, temperature, dtype)
                form["digests"][str(number)] = _write(folder, number, shard)
                form["finished"] = len(form["digests"])
                _write_manifest(folder, form)
                bar.advance()
    return CachedTeacher(folder)


def rows_kept(folder: Path) -> int:
    """How many rows a cache in the folder holds, finished or not; 0 where there is none."""
    try:
        form = _read_manifest(folder)
    except CacheError:
        return 0
    return min(int(form["finished"]) * int(form["rows_per_shard"]), int(form["rows"]))


def _missing(folder: Path, form: dict[str, Any]) -> list[int]:
    return [
        number
        for number in range(form["shards"])
        if str(number) not in form["digests"] or not _shard_path(folder, number).is_file()
    ]


def _manifest_of(folder: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a cache with this key; None when the folder holds no cache."""
    if not (folder / MANIFEST).is_file():
        return None
    form = _read_manifest(folder)
    differ = [name for name in key if form["key"].get(name) != key[name]]
    if differ:
        raise CacheError(
            f"{folder} is the cache of another {' and '.join(differ)}: give another folder, or delete this one"
        )
    return form


def _new_manifest(
    folder: Path,
    key: dict[str, Any],
    teacher: nn.Module,
    examples: Examples,
    rows_per_shard: int | None,
    dtype: torch.dtype,
    call: Call,
) -> dict[str, Any]:
    with live_teacher(teacher, call=call) as live:
        logits = live.view(examples.batch(torch.tensor([0]), torch.Generator()), torch.tensor([0])).logits
    if not isinstance(logits, Tensor):
        raise CacheError("the teacher returns no logits to keep")
    positions = logits.numel() // logits.shape[-1]
    index_bytes = 2 if logits.shape[-1] <= torch.iinfo(torch.int16).max else 4
    row_bytes = positions * (min(key["k"], logits.shape[-1]) * (dtype.itemsize + index_bytes) + 4)
    per_shard = rows_per_shard or max(1, SHARD_BYTES // row_bytes)
    form = {
        "format": FORMAT,
        "key": key,
        "vocabulary": logits.shape[-1],
        "rows": len(examples),
        "rows_per_shard": per_shard,
        "shards": -(-len(examples) // per_shard),
        "finished": 0,
        "digests": {},
    }
    _write_manifest(folder, form)
    return form


def _compute(
    live: Any, examples: Examples, start: int, stop: int, batch: int, k: int, temperature: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    pieces: list[TopLogits] = []
    shape: tuple[int, ...] = ()
    for first in range(start, stop, batch):
        rows = torch.arange(first, min(first + batch, stop))
        logits = live.view(examples.batch(rows, torch.Generator()), rows).logits
        shape = logits.shape[1:-1]
        pieces.append(top_logits(logits.flatten(0, -2), k, temperature))
    small = pieces[0].vocabulary <= torch.iinfo(torch.int16).max
    return {
        "values": torch.cat([p.values for p in pieces]).to(dtype).cpu().reshape(stop - start, *shape, -1),
        "indices": torch.cat([p.indices for p in pieces])
        .to(torch.int16 if small else torch.int32)
        .cpu()
        .reshape(stop - start, *shape, -1),
        "log_partition": torch.cat([p.log_partition for p in pieces]).float().cpu().reshape(stop - start, *shape),
    }


def _write(folder: Path, number: int, shard: dict[str, Tensor]) -> str:
    path = _shard_path(folder, number)
    try:
        with whole_file(path) as target:
            save_file({name: tensor.contiguous() for name, tensor in shard.items()}, target)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path} could not be written ({error}): free some space and build again; the shards before it are kept"
        ) from error
    return digest_of_file(path)


def _write_manifest(folder: Path, form: dict[str, Any]) -> None:
    try:
        write_text(folder / MANIFEST, json.dumps(form, indent=2) + "\n")
    except OSError as error:
        raise StorageError(
            f"{folder / MANIFEST} could not be written ({error}): free some space and build again; finished shards "
            "are kept"
        ) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    remedy = f"delete {folder} and build the cache again"
    try:
        form = read_json(path)
    except FileNotFoundError:
        raise CacheError(f"{folder} holds no teacher cache: make one with build_cache") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} is damaged ({error}): {remedy}") from None
    if isinstance(form, dict) and form.get("format") != FORMAT and type(form.get("format")) is int:
        raise CacheError(f"{path} has format {form['format']}; this tdkit-distill reads {FORMAT}: build it again")
    counts = ("format", "vocabulary", "rows", "rows_per_shard", "shards")
    if not isinstance(form, dict) or any(type(form.get(name)) is not int or form[name] < 1 for name in counts):
        raise CacheError(f"{path} is damaged ({', '.join(counts)} must be counts): {remedy}")
    key, digests, finished = form.get("key"), form.get("digests"), form.get("finished")
    if not isinstance(key, dict) or not isinstance(digests, dict) or type(finished) is not int:
        raise CacheError(f"{path} is damaged (key, digests or finished is missing or malformed): {remedy}")
    known = {str(number) for number in range(min(form["shards"], form["rows"]))}
    whole = form["shards"] == -(-form["rows"] // form["rows_per_shard"]) and finished == len(digests)
    temperature = key.get("temperature")
    if (
        not whole
        or not digests.keys() <= known
        or isinstance(temperature, bool)
        or not isinstance(temperature, int | float)
    ):
        raise CacheError(f"{path} is damaged (its counts do not go together): {remedy}")
    return form


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's class and of the names, shapes, dtypes and bytes of its state."""
    seen = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        data = tensor.detach().cpu().contiguous()
        seen.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
        seen.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()
