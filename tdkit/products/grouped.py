"""The product of each row with the matrix of its group, by one call of torch where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes, at a multiple of which each row starts
FEW = 2  # rows of each matrix
CAPABILITY = (8, 0)  # of a CUDA device, at least


def grouped_product(
    x: Tensor,  # (rows, in), the rows of the first matrix first
    weight: Tensor,  # (matrices, out, in)
    counts: Sequence[int],  # rows of each matrix
) -> Tensor | None:  # (rows, out)
    """``torch.nn.functional.grouped_mm``, which came with torch 2.10; None where it cannot be used.

    It takes neither float64 nor rows that are not aligned. It is not used with gradients, whose dtypes it limits too,
    nor for one row or two of a matrix, which one call each multiplies faster.
    """
    if len(x) <= FEW * sum(count > 0 for count in counts):
        return None
    product = getattr(F, "grouped_mm", None)
    if product is None or x.dtype not in DTYPES or weight.dtype is not x.dtype:
        return None
    if x.device.type not in ("cpu", "cuda") or any(size * x.itemsize % ALIGNMENT for size in weight.shape[1:]):
        return None
    if not (x.is_contiguous() and weight.is_contiguous()) or x.data_ptr() % ALIGNMENT or weight.data_ptr() % ALIGNMENT:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return None
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return None
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=x.device)
    y: Tensor = product(x, weight.mT, offs=ends)
    return y
