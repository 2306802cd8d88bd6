"""Moments as Kronecker products of small ones, mode by mode: what whitens a tensor train without spoiling it.

Multiplying a train by a Kronecker product of matrices, one for each mode, changes its cores and not its
ranks. So where C = C_1 kron ... kron C_d and S likewise, the best train in the metric is the best train of
the whitened weight. Real moments are not products; the nearest ones, in the sense that matters for
conditioning, give a good start and coordinates in which what is left of the metric is close to the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdkit.fitting.metric import extended, factor_and_inverse

Pairs = list[tuple[Tensor, Tensor]]  # for each mode a factor that whitens it, and its inverse

SWEEPS = 3  # each updates every mode once; more change nothing that is seen in the fits
RIDGE = 1e-6  # of the mean diagonal, added to each small moment: keeps its inverse finite


def product_moments(moment: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """M_1, ..., M_d whose Kronecker product is nearest to `moment` as the covariance of a Gaussian.

    Each update is the exact optimum for one mode: M_k is the mean of the blocks of `moment` after the other
    modes are whitened, so that directions of small and of large variance count alike. (The product nearest
    in the Frobenius norm sees only the largest.)

    Args:
        moment: (n, n) positive definite, or (n,) its diagonal; float64.
        modes: their product is n.

    Returns:
        for each mode a matrix (m, m), or a diagonal (m,) where `moment` is one.

    Source: the flip-flop algorithm, Dutilleul (1999), "The MLE algorithm for the matrix normal distribution".
    """
    count = len(modes)
    diagonal = moment.ndim == 1
    if diagonal:
        pairs = moment.reshape(*modes)
    else:
        axes = [axis for k in range(count) for axis in (k, count + k)]
        pairs = moment.reshape(*modes, *modes).permute(axes).reshape([m * m for m in modes])
    ones = [moment.new_ones(m) for m in modes]
    found = ones if diagonal else [one.diag() for one in ones]
    inverses = list(found)
    real = [k for k, m in enumerate(modes) if m > 1] or [0]  # a mode of 1 is a scale, and the others have that
    sweeps = SWEEPS if len(real) > 1 else 1
    for sweep in range(sweeps):
        for k in real:
            m = modes[k]
            mean = _contract_others(pairs, inverses, k) * (m / math.prod(modes))
            if diagonal:
                found[k] = mean + RIDGE * mean.mean()
                inverses[k] = found[k].reciprocal()
                continue
            mean = mean.reshape(m, m)
            mean = (mean + mean.T) / 2
            mean.diagonal().add_(RIDGE * mean.diagonal().mean())
            found[k] = mean
            if sweep == sweeps - 1 and k == real[-1]:
                break  # its inverse serves no other mode
            lower, failed = torch.linalg.cholesky_ex(mean)
            inverses[k] = torch.linalg.inv(mean) if int(failed) else torch.cholesky_inverse(lower)
    return found


def _contract_others(pairs: Tensor, inverses: Sequence[Tensor], keep: int) -> Tensor:
    """`pairs` contracted with the inverse of every mode but `keep`: a vector over that mode's pairs."""
    for k in reversed(range(len(inverses))):
        if k != keep:
            pairs = torch.tensordot(pairs, inverses[k].reshape(-1), dims=([k], [0]))
    return pairs


def whitening_modes(
    moment: Tensor | None, size: int, modes: Sequence[int], device: torch.device
) -> tuple[Tensor | None, Pairs | None]:
    """The moment of `size` entries with its padding to the product of `modes`, and what whitens each mode.

    Args:
        moment: ridged, (size, size) or its diagonal; None for the identity, which needs neither unless it is padded.
    """
    extra = math.prod(modes) - size
    if moment is None:
        if not extra:
            return None, None
        moment = torch.ones(size, dtype=torch.float64)  # the identity inside, nothing in the padding
    moment = moment.to(device)
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    filled = extended(moment, extra, float(diagonal.mean()))  # the padding must not look like a small direction
    pairs = [factor_and_inverse(small) for small in product_moments(filled, modes)]
    return extended(moment, extra, 0.0), pairs  # but errors in the padding count nothing


def along_modes(matrix: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``(F_1 kron ... kron F_d) @ matrix`` without forming the product.

    Args:
        matrix: (n, ...) with n the product of the modes.
        factors: for each mode a square matrix (m, m) or a diagonal (m,).
    """
    size = matrix.shape
    before, after = 1, matrix.numel()
    for factor in factors:
        m = factor.shape[0]
        after //= m
        blocks = matrix.reshape(before, m, after)
        matrix = blocks * factor[:, None] if factor.ndim == 1 else factor @ blocks
        before *= m
    return matrix.reshape(size)
