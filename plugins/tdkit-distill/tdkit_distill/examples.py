"""What a stage trains on: rows that can be asked for by number, the same for the same seed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit_distill.chunked import IGNORED
from tdkit_distill.errors import DataError

Batch = dict[str, Tensor]


class Examples(ABC):
    """Numbered training rows; entries named ``...labels`` are for the losses, everything else goes to the models.

    Attributes:
        fingerprint: changes when any row changes.
        fixed: whether a row is the same each time it is asked for, which caching a teacher needs.
    """

    fingerprint: str
    fixed: bool = True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """The rows with these numbers; whatever is random in them comes from `generator` only."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens per row, by which stages count."""


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


@dataclass(frozen=True)
class MaskTokens:
    """The token ids that masking needs."""

    mask: int
    start: int
    end: int
    vocabulary: int


class MaskedWindows(Examples):
    """Windows between start and end tokens with some tokens hidden, for BERT-like models.

    Of the chosen tokens 80% become the mask, 10% a random token, 10% stay; labels are the chosen ones.

    Args:
        ids: (count, length - 2) integers.
        share: how many tokens are chosen.

    Source: Devlin et al., BERT (2019), section 3.1; `MaskedPairs` adds next-sentence prediction.
    """

    fixed = False
    edges = 2  # tokens around the text of a row

    def __init__(
        self,
        ids: Tensor,
        tokens: MaskTokens,
        *,
        share: float = 0.15,
        fingerprint: str | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self._windows = Windows(ids, fingerprint, rows=rows)
        self.tokens = tokens
        self.share = share
        self.fingerprint = f"{self._windows.fingerprint}-masked-{share:g}"

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def length(self) -> int:
        return self._windows.length + self.edges

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        hidden, labels = self.enclose(*self.hide(self._windows.take(rows), generator))
        return {"input_ids": hidden, "labels": labels, "attention_mask": torch.ones_like(hidden)}

    def hide(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token ids with some hidden, and the labels of these."""
        draw = torch.rand(ids.shape, generator=generator)
        kind = torch.rand(ids.shape, generator=generator)
        random = torch.randint(self.tokens.vocabulary, ids.shape, generator=generator)
        chosen = draw < self.share
        labels = ids.masked_fill(~chosen, IGNORED)
        hidden = torch.where(chosen & (kind < 0.8), torch.full_like(ids, self.tokens.mask), ids)
        return torch.where(chosen & (kind >= 0.9), random, hidden), labels

    def enclose(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and labels between start and end tokens."""
        edge = torch.ones(len(hidden), 1, dtype=torch.long)
        hidden = torch.cat([edge * self.tokens.start, hidden, edge * self.tokens.end], dim=1)
        return hidden, torch.cat([edge * IGNORED, labels, edge * IGNORED], dim=1)


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


def mixed_seed(*parts: int | str) -> int:
    """One 63-bit seed from several numbers and names."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Order:
    """In which order a stage goes through its rows: a pure function of the seed and of how many were taken.

    Args:
        rows: how many there are.
        share: of them the stage uses, chosen by the seed.
        seed: of the choice and of the order of each epoch.
    """

    def __init__(self, rows: int, share: float, seed: int) -> None:
        self.seed = seed
        self.pool = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: max(1, round(share * rows))]
        self._epoch: tuple[int, Tensor] | None = None

    def take(self, start: int, count: int) -> Tensor:
        """Row numbers at positions start .. start + count - 1, over as many epochs as that takes."""
        found: list[Tensor] = []
        while count > 0:
            epoch, inside = divmod(start, len(self.pool))
            piece = self._order_of(epoch)[inside : inside + count]
            found.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.cat(found)

    def _order_of(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, "epoch", epoch))
            self._epoch = epoch, self.pool[torch.randperm(len(self.pool), generator=generator)]
        return self._epoch[1]
