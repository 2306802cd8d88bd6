"""Contraction of a TT-matrix with a batch: which order costs least, and when to build the matrix instead."""

from __future__ import annotations

from functools import cache

import opt_einsum
import torch
from torch import Tensor

Modes = tuple[int, ...]


def tt_equation(cores: int) -> tuple[str, list[str], str]:
    """Einsum subscripts of a TT-matrix: the batch, each core, the result."""
    symbol = opt_einsum.get_symbol
    ins = [symbol(1 + k) for k in range(cores)]
    outs = [symbol(1 + cores + k) for k in range(cores)]
    bonds = [symbol(1 + 2 * cores + k) for k in range(cores + 1)]
    subscripts = [bonds[k] + outs[k] + ins[k] + bonds[k + 1] for k in range(cores)]
    return symbol(0) + "".join(ins), subscripts, symbol(0) + "".join(outs)


@cache
def tt_path(tokens: int, core_shapes: tuple[Modes, ...]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The cheapest contraction path of x with the cores, and its multiply-adds for `tokens` rows of x."""
    batch, cores, out = tt_equation(len(core_shapes))
    sizes = {s: n for core, shape in zip(cores, core_shapes, strict=True) for s, n in zip(core, shape, strict=True)}
    x_shape = (tokens, *(sizes[s] for s in batch[1:]))
    equation = ",".join([batch, *cores]) + "->" + out
    path, info = opt_einsum.contract_path(equation, x_shape, *core_shapes, shapes=True, optimize="optimal")
    return tuple(tuple(step) for step in path), int(info.opt_cost) // 2


def tt_matmul(
    x: Tensor,  # (tokens, *in_modes)
    cores: list[Tensor],  # each (rank, out mode, in mode, next rank); the outer ranks are 1
) -> Tensor:  # (tokens, *out_modes)
    """Contract a batch with the cores by the cheapest path.

    Source: opt_einsum, Smith and Gray (2018).
    """
    batch, subscripts, out = tt_equation(len(cores))
    path, _ = tt_path(x.shape[0], tuple(tuple(c.shape) for c in cores))
    equation = ",".join([batch, *subscripts]) + "->" + out
    result = opt_einsum.contract(equation, x, *cores, optimize=list(path), backend="torch")
    assert isinstance(result, torch.Tensor)
    return result
