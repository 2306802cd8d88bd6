"""Tensors that a chain of blocks passes on, kept on disk between the runs of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdkit.models.shards import Entry, read_tensor, write_tensors
from tdkit.support.compatibility import tree_map_only


@dataclass(frozen=True)
class OnFile:
    """The place of a tensor that was kept."""

    path: Path
    name: str


class States:
    """Hidden states, their gradients and the arguments of blocks, in files of a folder.

    Args:
        folder: an empty folder.
        device: of the tensors that are read again.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device

    def write(self, what: str, block: int, batch: int, tensor: Tensor) -> None:
        """Keep a tensor under what it is, the number of its block and that of its batch."""
        write_tensors(self._path(what, block, batch), {what: Entry.of(tensor.detach())}, {})

    def read(self, what: str, block: int, batch: int) -> Tensor:
        return read_tensor(self._path(what, block, batch), what).to(self.device)

    def drop(self, what: str, block: int, batches: int) -> None:
        """Delete what was kept for a block."""
        for batch in range(batches):
            self._path(what, block, batch).unlink(missing_ok=True)

    def keep(self, arguments: Any, batch: int) -> Any:
        """Returns nested `arguments` with places of files for their tensors; one that occurs twice is written once."""
        found: dict[int, Tensor] = {}

        def place(tensor: Tensor) -> OnFile:
            found[id(tensor)] = tensor  # kept alive, so that ids stay theirs
            return OnFile(path, str(id(tensor)))

        path = self._path("arguments", 0, batch)
        kept = tree_map_only(Tensor, place, arguments)
        write_tensors(path, {str(key): Entry.of(tensor.detach()) for key, tensor in found.items()}, {})
        return kept

    def restore(self, kept: Any) -> Any:
        """Returns arguments that `keep` returned, or a part of them, with their tensors."""
        return tree_map_only(OnFile, lambda place: read_tensor(place.path, place.name).to(self.device), kept)

    def _path(self, what: str, block: int, batch: int) -> Path:
        return self.folder / f"{what}-{block:05}-{batch:06}.safetensors"
