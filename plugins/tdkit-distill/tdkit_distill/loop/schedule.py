"""Learning-rate factors: warmup, then cosine, linear or constant. A pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Schedule(BaseModel):
    """The factor on the learning rate at each optimizer step.

    Attributes:
        kind: what follows the warmup.
        warmup: steps when 1 or more, a share of the stage's steps when below 1; the factor rises linearly.
        floor: the factor that cosine and linear end at.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.0, ge=0)
    floor: float = Field(default=0.0, ge=0, le=1)

    def warmup_steps(self, total: int) -> int:
        """Steps of warmup in a stage of `total` steps."""
        return min(round(self.warmup * total) if self.warmup < 1 else round(self.warmup), total)

    def factor(self, step: int, total: int) -> float:
        """The factor at `step` (from 0) of `total`."""
        warmup = self.warmup_steps(total)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(total - warmup, 1)
        if self.kind == "constant":
            return 1.0
        falling = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.floor + (1 - self.floor) * falling
