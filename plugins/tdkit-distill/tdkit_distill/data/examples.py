"""Training data as numbered rows that are the same for the same seed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from tdkit.calibration.batches import LABELS, call_of
from tdkit.errors import CalibrationError
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tdkit_distill.errors import DataError

IGNORED = -100  # the label of a position that has none

Batch = dict[str, Tensor]


class Examples(ABC):
    """Numbered training rows; labels are for the losses, everything else goes to the models.

    Entries named ``...labels`` are labels; those named ``label``, ``target`` or ``targets`` are labels too, and also go
    to a model whose forward takes them. Entries whose names are numbers are positional arguments.

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
        """Tokens per row, the same for all rows; 1 where the rows hold no token ids.

        A stage's length in tokens is counted with it.
        """


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
        columns: tensors of equal first dimension. The second dimension of the first one that holds no labels counts as
            tokens if it is a matrix of integers; in any other table a row counts as one token.
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
        inputs = (column for name, column in self.columns.items() if not is_label(name))
        first = next(inputs, None)
        return first.shape[1] if first is not None and first.ndim == 2 and not first.is_floating_point() else 1

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        return {name: column[rows] for name, column in self.columns.items()}


def as_examples(data: Any, model: nn.Module) -> Examples:
    """Examples from what `distill` takes as data.

    Args:
        data: `Examples`; (count, length) token ids; a floating-point tensor, whose rows are the first argument of the
            models; named columns; or a ``TensorDataset``, whose tensors are the leading arguments of the models and,
            if there is one more than `model` takes, the labels.
        model: by whose forward the labels of a ``TensorDataset`` are told from arguments.

    Raises:
        DataError: for anything else, and for tensors that `model` does not take.
    """
    if isinstance(data, Examples):
        return data
    if isinstance(data, TensorDataset) and len(data.tensors) == 1:
        data = data.tensors[0]
    if isinstance(data, Tensor):
        return Table({"0": data}) if data.is_floating_point() else Windows(data)
    if isinstance(data, TensorDataset):
        return Table(_columns(data, model))
    if isinstance(data, Mapping):
        return Table(data)
    raise DataError(
        f"data is a {type(data).__name__}: give a tensor, a TensorDataset, named columns {{name: tensor}}, or a "
        "subclass of Examples for rows that are read or augmented on the way"
    )


def _columns(data: TensorDataset, model: nn.Module) -> dict[str, Tensor]:
    try:
        call = call_of(model, tuple(tensor[:1] for tensor in data.tensors))
    except CalibrationError as error:
        raise DataError(f"data is a TensorDataset, and {error}") from None
    count = len(data.tensors) - (call.labels is not None)
    columns = {str(number): tensor for number, tensor in enumerate(data.tensors[:count])}
    return columns if call.labels is None else {**columns, "labels": data.tensors[-1]}


def is_label(name: str) -> bool:
    """Whether an entry of a batch with this name holds labels."""
    return name in LABELS or name.endswith("labels")


def labels_of(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The labels of a batch: its entry ``labels``, ``label``, ``targets`` or ``target``; None when it has none."""
    return next((batch[name] for name in LABELS if name in batch), None)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape, dtype and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    seen = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    seen.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()
