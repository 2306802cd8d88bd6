"""Which positions of a batch count, how many there are, and means over them."""

from __future__ import annotations

import torch
from torch import Tensor

from tdkit_distill.losses.loss import Batch, row_count


def valid_positions(batch: Batch) -> Tensor | None:
    """The attention mask (batch, length) as bool: true for text, false for padding; None when there is none."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def has_positions(
    values: Tensor,  # (batch, length, ...)
    batch: Batch,
) -> bool:
    """Whether the attention mask applies to these values: their first two of three or more dimensions are its own."""
    mask = valid_positions(batch)
    return mask is not None and values.ndim > 2 and values.shape[:2] == mask.shape


def position_count(batch: Batch, masked: bool) -> Tensor:
    """How many positions a mean is over: those of the attention mask when `masked`, otherwise rows of equal length."""
    mask = valid_positions(batch)
    return torch.tensor(float(row_count(batch) if mask is None or not masked else mask.sum()))


def mean_over_positions(
    values: Tensor,  # (batch, length, ...), or anything that the mask does not apply to
    batch: Batch,
) -> Tensor:
    """The mean over the positions that are not padding and over all further dimensions; a scalar."""
    mask = valid_positions(batch)
    if mask is None or not has_positions(values, batch):
        return values.mean()
    weights = mask.reshape(*mask.shape, *[1] * (values.ndim - 2)).to(values.dtype)
    count = weights.sum().clamp(min=1) * values[0, 0].numel()
    return (values * weights).sum() / count


def working(x: Tensor) -> Tensor:
    """`x` in at least float32, the dtype in which differences are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
