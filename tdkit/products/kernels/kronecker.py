"""y = (sum_r L_r kron S_r) x + bias, or S_r kron L_r, for a small S: one launch, the permutations in its loads.

A program multiplies a few tokens, one row of the matrix product for each column of S, by some rows of every L_r, and
combines the results with S in registers. The intermediate result is never written to memory, and L is read
once for all the terms together, which is how `tdkit.products.train` lays it out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def kronecker_product(
    x: Tensor,  # (tokens, a2 * b2)
    a: Tensor,  # (terms, a1, a2), any strides
    b: Tensor,  # (terms, b1, b2), any strides
    bias: Tensor | None = None,  # (a1 * b1,)
    *,
    source: Tensor | None = None,  # (a2 * b2,) integers
    target: Tensor | None = None,  # (a1 * b1,) integers
) -> Tensor:  # (tokens, a1 * b1)
    """``x @ sum_r kron(a[r], b[r]).T + bias``, summed in float32 with no rounding in between.

    Args:
        source: where in x the entries lie that the columns of the Kronecker sum multiply; in order when None.
        target: where in y its rows go, and so which bias they get; in order when None.
    """
    terms, a1, a2 = a.shape
    _, b1, b2 = b.shape
    b_is_small = b1 * b2 <= a1 * a2
    large, small = (a, b) if b_is_small else (b, a)
    _, rows, inner = large.shape
    _, small_rows, small_columns = small.shape
    x, tokens = x.contiguous(), x.shape[0]
    y = torch.empty(tokens, a1 * b1, dtype=x.dtype, device=x.device)
    block_small, block_terms = triton.next_power_of_2(small_columns), triton.next_power_of_2(terms)
    block_lanes, block_columns, block_inner = (16, 16, 128) if tokens * block_small <= 16 else (64, 64, 64)
    block_tokens, block_rows = max(1, block_lanes // block_small), max(1, block_columns // block_terms)
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(tokens, block_tokens))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _kronecker[grid](
            x,
            large,
            small,
            bias,
            y,
            source,
            target,
            tokens,
            rows,
            inner,
            *small.stride(),
            *((b2, 1) if b_is_small else (1, b2)),
            *((b1, 1) if b_is_small else (1, b1)),
            LARGE_TERM=large.stride(0),
            LARGE_ROW=large.stride(1),
            LARGE_COLUMN=large.stride(2),
            TERMS=terms,
            SMALL_ROWS=small_rows,
            SMALL_COLUMNS=small_columns,
            BLOCK_TOKENS=block_tokens,
            BLOCK_SMALL=block_small,
            BLOCK_ROWS=block_rows,
            BLOCK_TERMS=block_terms,
            BLOCK_INNER=block_inner,
            num_warps=4,
            enable_fp_fusion=True,  # the default so far; Triton 3.9 warns where it is not said
        )
    return y


@triton.jit
def _kronecker(
    x: tl.tensor,  # (tokens, inner * SMALL_COLUMNS), contiguous
    large: tl.tensor,  # (TERMS, rows, inner)
    small: tl.tensor,  # (TERMS, SMALL_ROWS, SMALL_COLUMNS)
    bias: tl.tensor,
    y: tl.tensor,  # (tokens, rows * SMALL_ROWS), contiguous
    source: tl.tensor,
    target: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    inner: tl.tensor,
    small_term: tl.tensor,
    small_row: tl.tensor,
    small_column: tl.tensor,
    x_large: tl.tensor,  # how far apart the entries of x lie that neighbouring columns of L multiply, and of S
    x_small: tl.tensor,
    y_large: tl.tensor,  # the same for y and the rows
    y_small: tl.tensor,
    LARGE_TERM: tl.constexpr,  # strides of L, constants so that Triton sees which numbers are neighbours
    LARGE_ROW: tl.constexpr,
    LARGE_COLUMN: tl.constexpr,
    TERMS: tl.constexpr,
    SMALL_ROWS: tl.constexpr,
    SMALL_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SMALL: tl.constexpr,  # SMALL_COLUMNS or the next power of two
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,  # TERMS or the next power of two
    BLOCK_INNER: tl.constexpr,
) -> None:
    first_token, first_row = tl.program_id(1) * BLOCK_TOKENS, tl.program_id(0) * BLOCK_ROWS
    lane = tl.arange(0, BLOCK_TOKENS * BLOCK_SMALL)
    token, small_at = first_token + lane // BLOCK_SMALL, lane % BLOCK_SMALL
    lane_is_real = (token < tokens) & (small_at < SMALL_COLUMNS)
    column = tl.arange(0, BLOCK_ROWS * BLOCK_TERMS)
    row, term = first_row + column // BLOCK_TERMS, column % BLOCK_TERMS
    if LARGE_TERM == 1 and LARGE_ROW == TERMS and BLOCK_TERMS == TERMS:  # the same as below, as one run of neighbours
        column_at = first_row * TERMS + column
        column_is_real = column_at < rows * TERMS
    else:
        column_at = row * LARGE_ROW + term * LARGE_TERM
        column_is_real = (row < rows) & (term < TERMS)
    sums = tl.zeros([BLOCK_TOKENS * BLOCK_SMALL, BLOCK_ROWS * BLOCK_TERMS], tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        place = start + tl.arange(0, BLOCK_INNER)
        kept = lane_is_real[:, None] & (place < inner)[None, :]
        entry = place[None, :] * x_large + small_at[:, None] * x_small
        if source is not None:
            entry = tl.load(source + entry, mask=kept, other=0)
        given = tl.load(x + token[:, None].to(tl.int64) * (inner * SMALL_COLUMNS) + entry, mask=kept, other=0.0)
        tile = tl.load(
            large + place[:, None] * LARGE_COLUMN + column_at[None, :],
            mask=(place < inner)[:, None] & column_is_real[None, :],
            other=0.0,
        )
        sums = tl.dot(given, tile, sums, input_precision="ieee")
    sums = tl.reshape(sums, [BLOCK_TOKENS, BLOCK_SMALL, BLOCK_ROWS, BLOCK_TERMS])
    small_at, term = tl.arange(0, BLOCK_SMALL)[:, None], tl.arange(0, BLOCK_TERMS)[None, :]
    token, row = first_token + tl.arange(0, BLOCK_TOKENS)[:, None], first_row + tl.arange(0, BLOCK_ROWS)[None, :]
    kept = (token < tokens) & (row < rows)
    for small_row_at in tl.static_range(SMALL_ROWS):
        entries = tl.load(
            small + term * small_term + small_row_at * small_row + small_at * small_column,
            mask=(small_at < SMALL_COLUMNS) & (term < TERMS),
            other=0.0,
        ).to(tl.float32)
        found = tl.sum(tl.sum(sums * entries[None, :, None, :], 3), 1)
        where = row * y_large + small_row_at * y_small
        if target is not None:
            where = tl.load(target + where, mask=row < rows, other=0)
        if bias is not None:
            found += tl.load(bias + where, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(y + token.to(tl.int64) * (rows * SMALL_ROWS) + where, found.to(y.dtype.element_ty), mask=kept)
