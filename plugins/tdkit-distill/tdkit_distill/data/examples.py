"""Training data as numbered rows that are the same for the same seed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from tdkit_distill.errors import DataError

IGNORED = -100  # the label of a position that has none

Batch = dict[str, Tensor]


class Examples(ABC):
    """Numbered training rows; entries named ``...labels`` are for the losses, everything else goes to the models.

    Attributes:
        fingerprint: changes when any row changes.
        fixed: whether a row is the same each time it is read; a teacher cache needs that.
    """

    fingerprint: str
    fixed: bool = True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """The rows with these numbers; all random choices are drawn from `generator`."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens per row, the same for all rows; a stage's length in tokens is counted with it."""


class Windows(Examples):
    """Fixed windows of token ids for causal language models; each position's label is the next token.

    Args:
        ids: (count, length) integers; a memory-mapped file is read row by row.
        fingerprint: None computes one from the ids.
        rows: which of the ids' rows are windows to train on; all when None.
    """

    def __init__(self, ids: Tensor, fingerprint: str | None = None, *, rows: Tensor | None = None) -> None:
        if ids.ndim != 2 or ids.is_floating_point():
            raise DataError(f"windows must be (count, length) integers, not {tuple(ids.shape)} {ids.dtype}")
        if not len(ids):
            raise DataError("there is not one window of text: give more text or a shorter length")
        self.ids = ids
        self.rows = rows
        self.fingerprint = fingerprint or digest(ids if rows is None else ids[rows])

    def __len__(self) -> int:
        return len(self.ids) if self.rows is None else len(self.rows)

    def take(self, rows: Tensor) -> Tensor:
        """The token ids (count, length) of some windows."""
        return self.ids[rows if self.rows is None else self.rows[rows]].long()

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        ids = self.take(rows)
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        return {"input_ids": ids, "labels": labels}


class Table(Examples):
    """Rows of named tensors, such as ``input_ids``, ``attention_mask`` and ``labels`` of a classifier.

    Args:
        columns: tensors of equal first dimension; the first one's second dimension counts as tokens.
    """

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        sizes = {name: len(column) for name, column in columns.items()}
        if not columns or len(set(sizes.values())) != 1 or not min(sizes.values()):
            raise DataError(f"the columns of a table must have the same, positive number of rows, not {sizes}")
        self.columns = dict(columns)
        self.fingerprint = hashlib.sha256(
            "".join(f"{name}:{digest(column)}" for name, column in sorted(columns.items())).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def length(self) -> int:
        first = next(iter(self.columns.values()))
        return first.shape[1] if first.ndim > 1 else 1

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        return {name: column[rows] for name, column in self.columns.items()}


def as_examples(data: Examples | Tensor | Mapping[str, Tensor]) -> Examples:
    """Examples from themselves, from (count, length) token ids, or from named columns."""
    if isinstance(data, Examples):
        return data
    return Windows(data) if isinstance(data, Tensor) else Table(data)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape, dtype and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    seen = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    seen.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()
