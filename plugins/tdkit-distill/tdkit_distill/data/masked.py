"""Windows with hidden tokens for BERT-like models: masked language modelling, and pairs of segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdkit_distill.data.examples import IGNORED, Batch, Examples, Windows
from tdkit_distill.errors import DataError

NEXT_LABELS = "next_labels"  # 0: the second segment follows the first; 1: it is of another window


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


class MaskedPairs(MaskedWindows):
    """Masked windows in two segments: start, A, end, B, end, with token types 0 and 1.

    Each window is cut at a random place between its quarters. In half of the rows B is the rest of the
    window, in the others the same stretch of another window; ``next_labels`` says which. Tokens are hidden
    as in `MaskedWindows`.

    Args:
        ids: (count, length - 3) integers, at least two rows of four.
        tokens: as for `MaskedWindows`.
        options: as for `MaskedWindows`.

    Source: Devlin et al., BERT (2019), section 3.1.
    """

    edges = 3

    def __init__(self, ids: Tensor, tokens: MaskTokens, **options: Any) -> None:
        super().__init__(ids, tokens, **options)
        if len(self) < 2 or ids.shape[1] < 4:
            raise DataError(
                f"pairs of segments need at least two windows of seven tokens, not {len(self)} of {self.length}: give "
                "more text or longer windows"
            )
        self.fingerprint += "-pairs"

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        ids, width = self._windows.take(rows), self._windows.length
        cut = torch.randint(width // 4, 3 * width // 4 + 1, (len(ids), 1), generator=generator).clamp(1, width - 1)
        strange = torch.randint(2, (len(ids),), generator=generator)
        away = torch.randint(1, len(self), (len(ids),), generator=generator)
        others = self._windows.take((rows + away) % len(self))
        second = torch.arange(width) >= cut
        ids = torch.where(second & strange.bool().unsqueeze(1), others, ids)
        hidden, labels = self.hide(ids, generator)
        places = torch.arange(width + 1)
        before = (places - (places > cut).long()).clamp(max=width - 1)  # where each place's token was, but the cut
        hidden = hidden.gather(1, before).masked_fill(places == cut, self.tokens.end)
        labels = labels.gather(1, before).masked_fill(places == cut, IGNORED)
        hidden, labels = self.enclose(hidden, labels)
        types = torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), (places > cut).long()], dim=1)
        types = torch.cat([types, torch.ones(len(ids), 1, dtype=torch.long)], dim=1)
        batch = {"input_ids": hidden, "token_type_ids": types, "attention_mask": torch.ones_like(hidden)}
        return {**batch, "labels": labels, NEXT_LABELS: strange}
