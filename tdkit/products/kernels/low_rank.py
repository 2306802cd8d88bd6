"""y = left (right x) + bias for few rows of x in two launches, each factor read once.

Each product is a kernel whose programs share out the columns of the output. The first one, whose output is as
narrow as the rank, also shares out the inner dimension, so that every processor has something to read; its parts
are summed where the second kernel reads them, which takes no launch and always adds in the same order.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdkit.products.kernels import FEW_TOKENS

MOST_PARTS = 16
PROGRAMS = 2  # wanted on every processor of the device


def low_rank_pair(
    x: Tensor,  # (tokens, in), made for up to 16 tokens
    left: Tensor,  # (out, rank), any strides
    right: Tensor,  # (rank, in), any strides
    bias: Tensor | None = None,  # (out,)
    *,
    parts: int | None = None,
) -> Tensor:  # (tokens, out)
    """``x @ right.T @ left.T + bias``, summed in float32; with several tokens the middle is rounded to x's dtype.

    Args:
        parts: in how many parts, at most, the first product's sum is split; by the size of the device when None.
    """
    tokens, inner = x.shape
    rank = right.shape[0]
    x = x.contiguous()
    block_columns, block_inner = _blocks(right, tokens)
    if parts is None:
        tiles = triton.cdiv(rank, block_columns)
        parts = min(MOST_PARTS, max(1, PROGRAMS * _processors(x.device) // tiles))
    span = triton.cdiv(triton.cdiv(inner, parts), block_inner) * block_inner  # whole tiles
    parts = triton.cdiv(inner, span)
    between = torch.empty(parts, tokens, rank, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, left.shape[0], dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _launch(x.unsqueeze(0), right, None, between, span)
        _launch(between, left, bias, y.unsqueeze(0), rank)
    return y


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, span: int) -> None:
    parts, tokens, inner = x.shape
    columns = weight.shape[0]
    block_columns, block_inner = _blocks(weight, tokens)
    block_rows = 1 if tokens == 1 else FEW_TOKENS
    grid = (triton.cdiv(columns, block_columns), y.shape[0], triton.cdiv(tokens, block_rows))
    _few_rows[grid](
        x,
        weight,
        bias,
        y,
        tokens,
        columns,
        inner,
        span,
        *weight.stride(),
        PARTS=parts,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        BLOCK_INNER=block_inner,
        num_warps=4,
        enable_fp_fusion=True,  # the default so far; Triton 3.9 warns where it is not said
    )


def _blocks(weight: Tensor, tokens: int) -> tuple[int, int]:
    """Columns and inner entries of a tile, longer along the axis on which the weight's numbers are neighbours.

    The tensor cores, which take several tokens, want at least 16 of both.
    """
    if weight.stride(1) == 1:
        return (4, 512) if tokens == 1 else (16, 128)
    return 32, 64


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _few_rows(
    x: tl.tensor,  # (PARTS, rows, inner), contiguous; its parts are to be summed
    weight: tl.tensor,  # (columns, inner)
    bias: tl.tensor,  # (columns,) or None
    y: tl.tensor,  # (grid[1], rows, columns), contiguous: a part for each span of the inner dimension
    rows: tl.tensor,
    columns: tl.tensor,
    inner: tl.tensor,
    span: tl.tensor,
    weight_column: tl.tensor,
    weight_inner: tl.tensor,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # 1, or 16 for the tensor cores
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
) -> None:
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = tl.program_id(1) * span
    end = tl.minimum(start + span, inner)
    if BLOCK_ROWS == 1:
        sums = tl.zeros([BLOCK_INNER, BLOCK_COLUMNS], tl.float32)
    else:
        sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for at in range(start, end, BLOCK_INNER):
        place = at + tl.arange(0, BLOCK_INNER)
        tile = tl.load(
            weight + place[:, None] * weight_inner + column[None, :] * weight_column,
            mask=(place < end)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        given = tl.zeros([BLOCK_ROWS, BLOCK_INNER], tl.float32)
        for part in range(PARTS):
            given += tl.load(
                x + (part * rows + row[:, None]) * inner + place[None, :],
                mask=(row < rows)[:, None] & (place < end)[None, :],
                other=0.0,
            ).to(tl.float32)
        if BLOCK_ROWS == 1:
            sums += tl.trans(given) * tile.to(tl.float32)
        else:
            sums = tl.dot(given.to(tile.dtype), tile, sums, input_precision="ieee")
    if BLOCK_ROWS == 1:
        sums = tl.sum(sums, 0)[None, :]
    if bias is not None:
        sums += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    where = (tl.program_id(1) * rows + row[:, None]) * columns + column[None, :]
    tl.store(y + where, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])
