"""Matrices as trains of cores (rank, out mode, in mode, next rank): truncation, gauges and gradients.

A sum of Kronecker products ``sum_r A_r kron B_r`` is the train of two cores A (1, a1, a2, terms) and
B (terms, b1, b2, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.fitting.linalg import leading, orthogonal_split, working

Modes = tuple[int, ...]

FLOOR = 1e-8  # of the largest singular value of a bond: smaller ones count as this when bonds are balanced


def padded(matrix: Tensor, out_modes: Modes, in_modes: Modes) -> Tensor:
    """`matrix` with zeros up to the size that the modes span."""
    return F.pad(matrix, (0, math.prod(in_modes) - matrix.shape[1], 0, math.prod(out_modes) - matrix.shape[0]))


def interleaved(matrix: Tensor, out_modes: Modes, in_modes: Modes) -> Tensor:
    """A matrix of the full size as a tensor with one axis for each core, of size out mode times in mode."""
    count = len(out_modes)
    axes = [axis for k in range(count) for axis in (k, count + k)]
    sizes = [m * n for m, n in zip(out_modes, in_modes, strict=True)]
    return matrix.reshape(*out_modes, *in_modes).permute(axes).reshape(sizes)


def tt_svd(weight: Tensor, ranks: Sequence[int], out_modes: Modes, in_modes: Modes) -> list[Tensor]:
    """Cores of `weight` (out, in) by successive truncated SVDs, float64; zero padding to the modes.

    Args:
        weight: (out, in), at most the size that the modes span.
        ranks: (cores + 1), the outer two are 1.

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
    """The same train with each bond's singular values split evenly between its two sides.

    Both sides of bond k then have the Gram matrix diag(s_k), and the leading entries of a bond are those
    that a truncation keeps.

    Returns:
        cores, and the singular values s of each bond, descending.
    """
    cores = list(cores)
    ranks = [1, *(core.shape[-1] for core in cores)]
    for k in range(len(cores) - 1):  # left to right: orthonormal columns
        basis, triangle = torch.linalg.qr(cores[k].reshape(-1, cores[k].shape[-1]))
        cores[k] = basis.reshape(*cores[k].shape[:3], -1)
        cores[k + 1] = torch.tensordot(triangle, cores[k + 1], dims=1)
    spectra = []
    for k in range(len(cores) - 1, 0, -1):  # right to left: orthonormal rows, in the singular basis
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
    """`cores` with zeros up to the ranks asked for: a bond may be wider than its neighbours can use."""
    return [
        F.pad(core, (0, ranks[k + 1] - core.shape[3], 0, 0, 0, 0, 0, ranks[k] - core.shape[0]))
        for k, core in enumerate(cores)
    ]


def truncated_train(cores: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """The leading `ranks` (cores + 1) of the bonds of a balanced train."""
    return [core[: ranks[k], :, :, : ranks[k + 1]] for k, core in enumerate(cores)]


def tt_tensor(cores: Sequence[Tensor]) -> Tensor:
    """The tensor that the cores stand for, one axis for each core: (out mode * in mode, ...)."""
    tensor = cores[0].reshape(-1, cores[0].shape[-1])
    for core in cores[1:]:
        tensor = (tensor.reshape(-1, core.shape[0]) @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
    return tensor.reshape([core.shape[1] * core.shape[2] for core in cores])


def tt_matrix(cores: Sequence[Tensor]) -> Tensor:
    """The matrix that the cores stand for, of the full size that the modes span."""
    count = len(cores)
    sizes = [size for core in cores for size in core.shape[1:3]]
    tensor = tt_tensor(cores).reshape(sizes).permute([*range(0, 2 * count, 2), *range(1, 2 * count, 2)])
    return tensor.reshape(math.prod(core.shape[1] for core in cores), -1)


def tt_pullback(cores: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    """The gradient for each core of a function whose gradient for the matrix is `slope`.

    Each interface is contracted once: the train right of each bond beforehand, the train left of it on the way.

    Args:
        cores: of a train that spans `slope`.
        slope: a matrix of the full size.
    """
    out_modes, in_modes = tuple(c.shape[1] for c in cores), tuple(c.shape[2] for c in cores)
    rights = [cores[-1].reshape(cores[-1].shape[0], -1)]  # right of each bond, (rank, everything after)
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
