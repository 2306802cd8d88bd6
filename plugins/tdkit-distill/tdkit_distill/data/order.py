"""The order in which rows are visited, and random seeds: pure functions of seed, stage and step."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def mixed_seed(*parts: int | str) -> int:
    """A 63-bit seed derived from several numbers and names."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Order:
    """The order in which a stage goes through its rows, shuffled in each epoch: a pure function of seed and position.

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
