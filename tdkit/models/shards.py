"""Files of tensors (safetensors), read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tdkit.errors import CheckpointError
from tdkit.shapes import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

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
    """The tensors of a folder of safetensors files, by name; none is in memory until it is read.

    Args:
        folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names.

    Attributes:
        tensors: where each tensor lies, with its dtype and shape.

    Raises:
        CheckpointError: when there are no such files, one is missing or damaged, or a dtype is unknown.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        for path in self.files():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118, not a dict
                        part = file.get_slice(name)
                        dtype = DTYPES.get(part.get_dtype())
                        if dtype is None:
                            raise CheckpointError(f"{path}: {name} has the unknown dtype {part.get_dtype()}")
                        self.tensors[name] = Stored(path, dtype, tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or truncated: {error}") from None

    def files(self) -> list[Path]:
        """Returns the paths of the files of tensors."""
        index = self.folder / INDEX
        if not index.is_file():
            if (self.folder / SINGLE).is_file():
                return [self.folder / SINGLE]
            raise CheckpointError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}, and weights of other formats cannot be read one by "
                "one: load the model, and write it with model.save_pretrained(folder)"
            )
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}") from None
        foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if foreign:
            raise CheckpointError(f"{index} names {foreign[0]!r}, which is no file of this folder")
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{self.folder} lacks {', '.join(missing[:3])}: the copy is incomplete")
        return [self.folder / name for name in names]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a tensor on the CPU, cast to `dtype` if it is a floating-point one.

        Raises:
            CheckpointError: when the file is damaged.
        """
        return read_tensor(self.tensors[name].path, name, dtype)


def read_tensor(path: Path, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Returns one tensor of a file on the CPU, cast to `dtype` if it is a floating-point one.

    It is a copy: what a file maps into memory stays there until it is closed, and lies at any alignment, which changes
    the last bits of results.

    Raises:
        CheckpointError: when the file is damaged or has no such tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            mapped: Tensor = file.get_tensor(name)
            wanted = dtype if dtype is not None and mapped.is_floating_point() else mapped.dtype
            return torch.empty(mapped.shape, dtype=wanted).copy_(mapped)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: '{name}' cannot be read: {error}") from None


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
