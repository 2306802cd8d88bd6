"""What one model returned for a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tdkit_distill.models.taps import AttentionRecord


@dataclass(frozen=True)
class TopLogits:
    """The k largest teacher logits of each position, and what is needed to normalise them.

    Attributes:
        values: (rows, k) logits, largest first.
        indices: (rows, k) their token ids.
        log_partition: (rows,) logsumexp of all logits divided by `temperature`.
        temperature: that the partition was taken at.
        vocabulary: how many logits there were.
    """

    values: Tensor
    indices: Tensor
    log_partition: Tensor
    temperature: float
    vocabulary: int

    def rows(self, start: int, stop: int) -> TopLogits:
        """Some of the positions."""
        cut = slice(start, stop)
        return TopLogits(
            self.values[cut], self.indices[cut], self.log_partition[cut], self.temperature, self.vocabulary
        )

    def select(self, keep: Tensor) -> TopLogits:
        """The positions where `keep` (rows,) is true."""
        return TopLogits(
            self.values[keep], self.indices[keep], self.log_partition[keep], self.temperature, self.vocabulary
        )


@dataclass
class View:
    """What one model returned for a batch.

    Attributes:
        logits: (batch, ..., classes), the largest of them from a cache, or None.
        outputs: of modules inside the model, by the name asked for; see `tapped`.
        attention: recorded inside the model, by the name asked for; see `tapped`.
    """

    logits: Tensor | TopLogits | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, AttentionRecord] = field(default_factory=dict)
