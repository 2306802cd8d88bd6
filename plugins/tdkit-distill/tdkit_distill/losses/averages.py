"""Which positions count, and means over them."""

from __future__ import annotations

import torch
from torch import Tensor

from tdkit_distill.losses.loss import Batch


def valid_rows(batch: Batch) -> Tensor | None:
    """Which positions (batch, length) are text rather than padding; None for all."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def mean_over(
    values: Tensor,  # (batch, length, ...) or (batch, ...)
    keep: Tensor | None,  # (batch, length)
) -> Tensor:
    """The mean over the positions that are kept and all trailing dimensions."""
    if keep is None or keep.shape != values.shape[: keep.ndim]:
        return values.mean()
    weights = keep.reshape(*keep.shape, *[1] * (values.ndim - keep.ndim)).to(values.dtype)
    count = weights.sum().clamp(min=1) * values[0, 0].numel()
    return (values * weights).sum() / count


def working(x: Tensor) -> Tensor:
    """At least float32, in which differences are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
