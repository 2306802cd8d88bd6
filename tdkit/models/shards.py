"""Files of tensors (safetensors), read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tdkit.errors import CheckpointError
from tdkit.shapes import Shape
from tdkit.support.documents import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REOPEN = 2**24  # bytes

DTYPES = {  # by their names in a file, in the order in which safetensors sorts them
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: Shape

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Shards:
    """The tensors of some safetensors files, by name; none is in memory until it is read.

    Args:
        files: the paths.

    Attributes:
        tensors: where each tensor lies, with its dtype and shape.

    Raises:
        CheckpointError: when a file is missing, damaged or truncated, or a dtype is unknown.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        self.files = [Path(path) for path in files]
        self.tensors: dict[str, Stored] = {}
        self._open: tuple[Path, Any] | None = None
        self._mapped = 0  # bytes read from the file that is open
        for path in self.files:
            with _told(path), safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, not a dict
                    part = file.get_slice(name)
                    dtype = DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise CheckpointError(f"{path}: {name} has the unknown dtype {part.get_dtype()}")
                    self.tensors[name] = Stored(path, dtype, tuple(part.get_shape()))

    def mapped(self, name: str) -> Tensor:
        """Returns a tensor as a view of its file, which is valid until the next call.

        What is read of a file stays in memory while it is open, so that it is opened anew every `REOPEN` bytes.

        Raises:
            CheckpointError: when the file is damaged.
        """
        stored = self.tensors[name]
        with _told(stored.path):
            if self._open is None or self._open[0] != stored.path or self._mapped > REOPEN:
                self._open = None  # first, so that the pages of the one before are freed
                self._open, self._mapped = (stored.path, safe_open(stored.path, framework="pt")), 0
            self._mapped += stored.bytes
            tensor: Tensor = self._open[1].get_tensor(name)
            return tensor

    def read(self, name: str, dtype: torch.dtype | None = None, stride: tuple[int, ...] | None = None) -> Tensor:
        """Returns a tensor on the CPU.

        It is a copy: what a file maps into memory lies at any alignment, which changes the last bits of results.

        Args:
            name: of the tensor.
            dtype: cast to it, if the tensor is a floating-point one; when None it keeps its dtype.
            stride: of the tensor; when None it is contiguous.

        Raises:
            CheckpointError: when the file is damaged.
        """
        mapped = self.mapped(name)
        wanted = dtype if dtype is not None and mapped.is_floating_point() else mapped.dtype
        if stride is None:
            return torch.empty(mapped.shape, dtype=wanted).copy_(mapped)
        return torch.empty_strided(mapped.shape, stride, dtype=wanted).copy_(mapped)

    def close(self) -> None:
        """Close the file that was read last."""
        self._open = None


def read_tensor(path: Path, name: str) -> Tensor:
    """Returns a copy of one tensor of a file on the CPU.

    Raises:
        CheckpointError: when the file is damaged or has no such tensor.
    """
    with _told(path), safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name).clone()
        return tensor


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Returns whether two tensors on the CPU have one dtype, one shape and the same bits; NaN is the same as itself."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    whole = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*whole)


def weight_files(folder: Path) -> list[Path]:
    """Returns the files with the tensors of a folder: one, or the shards of an index.

    Raises:
        CheckpointError: when there are none, one is missing, or the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}, and weights of other formats are not read: load the model, "
            "and write it with model.save_pretrained(folder)"
        )
    try:
        index = read_json(folder / INDEX)
        names = sorted(set(index["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{names!r} are no names of files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from None
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: the copy is incomplete")
    return [folder / name for name in names]


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from None


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its form, known beforehand, and a function that returns it."""

    dtype: torch.dtype
    shape: Shape
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_tensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write the file that ``safetensors.torch.save_file`` writes, byte for byte, with one tensor in memory at a time.

    Raises:
        CheckpointError: when a dtype has no name in this format, or a tensor has not the dtype and shape announced.
    """
    spelt = {dtype: name for name, dtype in DTYPES.items()}
    unknown = [name for name, entry in entries.items() if entry.dtype not in spelt]
    if unknown:
        raise CheckpointError(f"{unknown[0]}: safetensors files hold no {entries[unknown[0]].dtype}")
    order: Sequence[str] = sorted(entries, key=lambda name: (-list(DTYPES.values()).index(entries[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        entry = entries[name]
        start, end = end, end + torch.Size(entry.shape).numel() * entry.dtype.itemsize
        header[name] = {"dtype": spelt[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            entry, tensor = entries[name], entries[name].read()
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != tuple(entry.shape):
                raise CheckpointError(
                    f"{name} was announced as {entry.dtype} {tuple(entry.shape)} and is {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
