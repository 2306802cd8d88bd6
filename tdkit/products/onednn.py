"""oneDNN's product of a batch and a matrix, where this machine's CPU computes it faster than torch's own `linear`.

For float32 torch calls the library it was built with, MKL as a rule, which is fastest on Intel's processors.
oneDNN is in every usual build too, and is what torch.compile calls. Which one is faster is measured, once in a
process. ``torch.backends.mkldnn.flags(enabled=False)`` turns oneDNN off. The constants were measured with
``python tests/benchmarks/speed.py --parts eval,decode``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.products.recording import is_recorded
from tdkit.shapes import Shape
from tdkit.support.compatibility import in_transform, onednn_enabled, onednn_has_linear, onednn_linear

ENTRIES = 2**17  # oneDNN is used from this size of a matrix, or
MULTIPLY_ADDS = 2**22  # from this size of a product: a call takes 10 to 30 us more
CLEARLY = 0.95  # of torch's time, below which oneDNN wins the trial
TRIAL = (64, 512, 1024)  # rows of x, columns and rows of the matrix
ROUNDS = 7


def linear(
    x: Tensor,  # (*batch, in)
    matrix: Tensor,  # (out, in), in memory by rows or by columns
    bias: Tensor | None = None,  # (out,)
) -> Tensor:  # (*batch, out)
    """``x @ matrix.T + bias``, by oneDNN in inference mode only: torch has no derivative of its operator."""
    rows, columns = matrix.shape
    if is_recorded() or not serves(x, (rows, columns)) or not _accepts(x, matrix, bias):
        return F.linear(x, matrix, bias)
    return onednn_linear(x, matrix, bias)


def serves(x: Tensor, shape: Shape) -> bool:
    """Whether `linear` uses oneDNN for this x if a matrix of `shape` (out, in) lies in memory by rows."""
    rows, columns = shape
    return (
        (rows * columns >= ENTRIES or x.numel() * rows >= MULTIPLY_ADDS)
        and torch.is_inference_mode_enabled()
        and x.dtype is torch.float32
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and onednn_enabled()  # torch.backends.mkldnn.flags
        and faster()
        and not in_transform()
    )


def _accepts(x: Tensor, matrix: Tensor, bias: Tensor | None) -> bool:
    by_columns = x.numel() > matrix.shape[1]  # for one row of x such a matrix would be copied first
    return (
        matrix.dtype is torch.float32
        and matrix.is_cpu
        and (bias is None or bias.dtype is torch.float32)
        and x.shape[-1] == matrix.shape[1]
        and x.is_contiguous()
        and (matrix.is_contiguous() or (by_columns and matrix.mT.is_contiguous()))  # gaps: 1000 times slower
    )


@cache
def faster() -> bool:
    """Whether oneDNN is available and wins a trial of a few milliseconds, made at the first call."""
    if not onednn_has_linear():
        return False
    n, columns, rows = TRIAL
    with torch.inference_mode():
        x, matrix = torch.ones(n, columns), torch.ones(rows, columns)
        layouts = matrix, matrix.mT.contiguous().mT
        calls = [partial(call, x, layout, None) for layout in layouts for call in (onednn_linear, F.linear)]
        times = [[_seconds(call) for call in calls] for _ in range(ROUNDS)][1:]
    best = [min(samples) for samples in zip(*times, strict=True)]
    return all(ours < CLEARLY * theirs for ours, theirs in (best[:2], best[2:]))


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
