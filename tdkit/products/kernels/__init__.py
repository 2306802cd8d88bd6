"""Triton kernels for products that are slow as calls of a library: few tokens, small factors.

They have no backward pass. Triton is imported when the first of them runs: that takes a second, and not every
machine has it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from tdkit.products import cost

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_TOKENS = 16  # the most rows of x that the low-rank pair serves: one tile of the tensor cores
SMALL = 8  # the most rows, columns and terms of the small factor of a Kronecker sum: it is combined in registers
AMPERE = (8, 0)  # the first GPUs whose tensor cores multiply every one of the dtypes


@cache
def runnable() -> bool:
    """Whether this machine has Triton and a GPU on which the kernels run."""
    if find_spec("triton") is None or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= AMPERE


def offered(dtype: torch.dtype, device: str) -> bool:
    """Whether a kernel may be chosen for a dtype on a device type."""
    return device in cost.KERNEL_DEVICES and dtype in DTYPES and runnable()


def accept(x: Tensor, *operands: Tensor | None) -> bool:
    """Whether a kernel can take these tensors: of one dtype and device, no gradient to record, outside autocast.

    A trace would not see it, and a tensor of another class may hold no numbers of its own.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if (
        tracing
        or x.device.type not in cost.KERNEL_DEVICES
        or x.numel() == 0
        or torch.is_autocast_enabled(x.device.type)
    ):
        return False
    every = [x, *(operand for operand in operands if operand is not None)]
    if any(type(each) not in (Tensor, nn.Parameter) for each in every):
        return False
    if any(each.dtype is not x.dtype or each.device != x.device for each in every):
        return False
    return not (torch.is_grad_enabled() and any(each.requires_grad for each in every))
