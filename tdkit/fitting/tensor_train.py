"""Matrices as tensor trains of cores (rank, out mode, in mode, next rank): TT-SVD, truncation and gradients.

A sum of Kronecker products ``sum_r A_r kron B_r`` is the train of two cores A (1, a1, a2, terms) and
B (terms, b1, b2, 1). A bond is the index that two neighbouring cores share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.fitting.linalg import leading, orthogonal_split, working

Modes = tuple[int, ...]

FLOOR = 1e-8  # times the largest singular value of a bond: the least value that `bond_balanced` divides by


def padded(matrix: Tensor, out_modes: Modes, in_modes: Modes) -> Tensor:
    """`matrix` zero-padded to (product of out modes, product of in modes)."""
    return F.pad(matrix, (0, math.prod(in_modes) - matrix.shape[1], 0, math.prod(out_modes) - matrix.shape[0]))


def interleaved(matrix: Tensor, out_modes: Modes, in_modes: Modes) -> Tensor:
    """A matrix of the padded size as a tensor with one axis per core, of size out mode times in mode."""
    count = len(out_modes)
    axes = [axis for k in range(count) for axis in (k, count + k)]
    sizes = [m * n for m, n in zip(out_modes, in_modes, strict=True)]
    return matrix.reshape(*out_modes, *in_modes).permute(axes).reshape(sizes)


def tt_svd(weight: Tensor, ranks: Sequence[int], out_modes: Modes, in_modes: Modes) -> list[Tensor]:
    """Cores of `weight` by successive truncated SVDs.

    Args:
        weight: (out, in), any float dtype; zero-padded to the product of the modes.
        ranks: cores + 1 numbers, of which the first and the last are 1.
        out_modes, in_modes: one per core; their products are at least out and in.

    Returns:
        Cores (rank, out mode, in mode, next rank), float64.

    Source: Oseledets (2011), algorithm 1, on the tensor with row and column modes interleaved.
    """
    rest = interleaved(padded(working(weight), out_modes, in_modes), out_modes, in_modes)
    cores = []
    rank = 1
    for k in range(len(out_modes) - 1):
        unfolded = rest.reshape(rank * out_modes[k] * in_modes[k], -1)
        left, rest = orthogonal_split(unfolded, min(ranks[k + 1], *unfolded.shape))
        cores.append(left.reshape(rank, out_modes[k], in_modes[k], -1))
        rank = left.shape[1]
    cores.append(rest.reshape(rank, out_modes[-1], in_modes[-1], 1))
    return _widened(cores, ranks)


def bond_balanced(cores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same matrix, with the singular values of each bond split evenly between its two sides.

    The cores left of bond k, contracted, and those right of it then both have the Gram matrix diag(s_k). Truncation
    keeps the leading entries of each bond.

    Args:
        cores: (rank, out mode, in mode, next rank) each, float64.

    Returns:
        The cores, and the singular values s_k of each bond, descending.
    """
    cores = list(cores)
    ranks = [1, *(core.shape[-1] for core in cores)]
    for k in range(len(cores) - 1):  # left to right: make the columns orthonormal
        basis, triangle = torch.linalg.qr(cores[k].reshape(-1, cores[k].shape[-1]))
        cores[k] = basis.reshape(*cores[k].shape[:3], -1)
        cores[k + 1] = torch.tensordot(triangle, cores[k + 1], dims=1)
    spectra = []
    for k in range(len(cores) - 1, 0, -1):  # right to left: orthonormal rows, in the basis of singular vectors
        core = cores[k]
        flat = core.reshape(core.shape[0], -1)
        left, squares = leading(flat @ flat.T, min(flat.shape))  # exact for any orthonormal basis
        values = squares.clamp_min(0).sqrt()
        safe = values.clamp_min(float(values[0]) * FLOOR + torch.finfo(values.dtype).tiny)
        cores[k] = ((left.T @ flat) / safe[:, None]).reshape(-1, *core.shape[1:])
        cores[k - 1] = torch.tensordot(cores[k - 1], left * safe, dims=1)
        spectra.append(values)
    spectra.reverse()
    for k, values in enumerate(spectra):
        level = values.clamp_min(float(values[0]) * FLOOR + torch.finfo(values.dtype).tiny).sqrt()
        cores[k] = cores[k] / level
        cores[k + 1] = cores[k + 1] * level[:, None, None, None]
    spectra = [F.pad(values, (0, rank - len(values))) for values, rank in zip(spectra, ranks[1:-1], strict=True)]
    return _widened(cores, ranks), spectra


def _widened(cores: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """`cores` zero-padded to `ranks`, which may exceed the largest rank that a bond can have."""
    return [
        F.pad(core, (0, ranks[k + 1] - core.shape[3], 0, 0, 0, 0, 0, ranks[k] - core.shape[0]))
        for k, core in enumerate(cores)
    ]


def truncated_train(cores: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """A balanced train cut to `ranks` (cores + 1 numbers): the leading entries of each bond."""
    return [core[: ranks[k], :, :, : ranks[k + 1]] for k, core in enumerate(cores)]


def tt_tensor(cores: Sequence[Tensor]) -> Tensor:
    """The tensor of a train, with one axis per core: (out mode * in mode, ...)."""
    tensor = cores[0].reshape(-1, cores[0].shape[-1])
    for core in cores[1:]:
        tensor = (tensor.reshape(-1, core.shape[0]) @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
    return tensor.reshape([core.shape[1] * core.shape[2] for core in cores])


def tt_matrix(cores: Sequence[Tensor]) -> Tensor:
    """The matrix of a train, (product of out modes, product of in modes)."""
    count = len(cores)
    sizes = [size for core in cores for size in core.shape[1:3]]
    tensor = tt_tensor(cores).reshape(sizes).permute([*range(0, 2 * count, 2), *range(1, 2 * count, 2)])
    return tensor.reshape(math.prod(core.shape[1] for core in cores), -1)


def tt_pullback(cores: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    """The vector-Jacobian product of `tt_matrix`: the gradient of each core, given that of the matrix.

    The cores right of each bond are contracted once beforehand, the cores left of it once during the sweep.

    Args:
        cores: (rank, out mode, in mode, next rank) each.
        slope: gradient with respect to the matrix, (product of out modes, product of in modes).

    Returns:
        One gradient per core, of its shape.
    """
    out_modes, in_modes = tuple(c.shape[1] for c in cores), tuple(c.shape[2] for c in cores)
    rights = [cores[-1].reshape(cores[-1].shape[0], -1)]  # the cores right of each bond, (rank, product of their modes)
    for core in reversed(cores[1:-1]):
        grown = core.reshape(-1, core.shape[-1]) @ rights[-1]
        rights.append(grown.reshape(core.shape[0], -1))
    rights.reverse()
    rest = interleaved(slope, out_modes, in_modes)
    gradients = []
    for k, core in enumerate(cores):
        size = core.shape[1] * core.shape[2]
        rest = rest.reshape(core.shape[0] * size, -1)
        gradient = rest @ rights[k].T if k + 1 < len(cores) else rest
        gradients.append(gradient.reshape(core.shape))
        if k + 1 < len(cores):
            rest = core.reshape(-1, core.shape[-1]).T @ rest
    return gradients
