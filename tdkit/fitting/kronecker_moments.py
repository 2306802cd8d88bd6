"""Second moments approximated by Kronecker products of small ones, one for each mode of a tensor train.

Multiplying a tensor train by a Kronecker product of matrices, one for each mode, changes its cores and keeps its
ranks. So if C = C_1 kron ... kron C_d and S likewise, the best train in the metric is the best train of the whitened
weight. Measured moments are not Kronecker products; the nearest ones give a good starting point, and coordinates in
which the remaining metric is close to the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdkit.fitting.metric import extended, factor_and_inverse

Pairs = list[tuple[Tensor, Tensor]]  # for each mode: F with F^T F = the mode's moment, and the inverse of F

# Tuned by hand; `python tests/benchmarks/fits.py --parts objective` shows what a change does.
SWEEPS = 3  # iterations of the flip-flop algorithm, each of which updates every mode once
RIDGE = 1e-6  # share of the mean diagonal added to each small moment, so that its inverse is finite


def product_moments(moment: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """M_1, ..., M_d whose Kronecker product is nearest to `moment` as the covariance of a Gaussian.

    Each update is the exact optimum for one mode: M_k is the mean of the blocks of `moment` after whitening the
    other modes, so that directions of small and of large variance have equal weight. (The product nearest in the
    Frobenius norm fits the directions of large variance only.)

    Args:
        moment: (n, n), positive definite, or its diagonal (n,); float64.
        modes: sizes m_1, ..., m_d whose product is n.

    Returns:
        One matrix (m_k, m_k) per mode, or one diagonal (m_k,) per mode if `moment` is a diagonal; float64.

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
    real = [k for k, m in enumerate(modes) if m > 1] or [0]  # a mode of size 1 is a scale only
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
                break  # no later update needs its inverse
            lower, failed = torch.linalg.cholesky_ex(mean)
            inverses[k] = torch.linalg.inv(mean) if int(failed) else torch.cholesky_inverse(lower)
    return found


def _contract_others(pairs: Tensor, inverses: Sequence[Tensor], keep: int) -> Tensor:
    """`pairs` contracted with the inverses of all modes except `keep`: (m * m,), or (m,) for a diagonal."""
    for k in reversed(range(len(inverses))):
        if k != keep:
            pairs = torch.tensordot(pairs, inverses[k].reshape(-1), dims=([k], [0]))
    return pairs


def whitening_modes(
    moment: Tensor | None, size: int, modes: Sequence[int], device: torch.device
) -> tuple[Tensor | None, Pairs | None]:
    """The moment padded to the product of `modes`, and the whitening factors of each mode.

    Args:
        moment: with its ridge, (size, size) or its diagonal (size,), float64; None for the identity.
        size: of the moment before padding.
        modes: sizes whose product is at least `size`.
        device: of the results.

    Returns:
        The moment with zeros in the padding, so that errors there do not count, and one pair per mode; (None, None)
        for an identity that is not padded.
    """
    extra = math.prod(modes) - size
    if moment is None:
        if not extra:
            return None, None
        moment = torch.ones(size, dtype=torch.float64)
    moment = moment.to(device)
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    filled = extended(moment, extra, float(diagonal.mean()))  # zeros would count as directions of small variance
    pairs = [factor_and_inverse(small) for small in product_moments(filled, modes)]
    return extended(moment, extra, 0.0), pairs


def along_modes(matrix: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``(F_1 kron ... kron F_d) @ matrix`` without forming the Kronecker product.

    Args:
        matrix: (n, ...), where n is the product of the modes.
        factors: one square matrix (m, m) or diagonal (m,) per mode.
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
