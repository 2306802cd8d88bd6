"""Truncated factorisations and the Van Loan-Pitsianis rearrangement.

Fits run in float64 whatever the model's dtype: a float32 Gram matrix loses the singular values below 1e-4 of the
largest, and the CPU has no eigensolver for half precision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tdkit.shapes import Shape

# Where Lanczos iterations are faster than `torch.linalg.eigh`. Tuned by hand on two CPU cores;
# `python tests/benchmarks/fits.py --parts seconds,peers` times the fits that use them.
LANCZOS_SHARE = 0.04  # largest ratio of rank to size
LANCZOS_SIDE = 512  # smallest size of the matrix


def working(matrix: Tensor) -> Tensor:
    """`matrix` detached and cast to float64, the dtype of all fits."""
    return matrix.detach().to(torch.float64)


def principal(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors and singular values of `matrix`, from its Gram matrix (n, n).

    Args:
        matrix: (*batch, m, n) float64; fastest for n <= m.
        rank: how many to return, 1 <= rank <= n.

    Returns:
        Vectors (*batch, n, rank) with orthonormal columns, and values (*batch, rank), descending and non-negative.
    """
    if _lanczos_pays(matrix, rank):
        array: np.ndarray = matrix.numpy()
        vectors, squares = _lanczos(lambda v: array.T @ (array @ v), matrix.shape[1], rank)
    else:
        vectors, squares = leading(matrix.mT @ matrix, rank)
    return vectors, squares.clamp_min(0).sqrt()


def leading(symmetric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors (*batch, n, rank) and eigenvalues (*batch, rank), descending.

    Args:
        symmetric: (*batch, n, n) float64.
        rank: 1 <= rank <= n.
    """
    if _lanczos_pays(symmetric, rank):
        array: np.ndarray = symmetric.numpy()
        return _lanczos(lambda v: array @ v, symmetric.shape[0], rank)
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors[..., -rank:].flip(-1), values[..., -rank:].flip(-1)


def _lanczos_pays(matrix: Tensor, rank: int) -> bool:
    n = matrix.shape[-1]
    return matrix.ndim == 2 and n >= LANCZOS_SIDE and rank <= LANCZOS_SHARE * n and matrix.device.type == "cpu"


def _lanczos(product: Callable[[np.ndarray], np.ndarray], n: int, rank: int) -> tuple[Tensor, Tensor]:
    from scipy.sparse.linalg import LinearOperator, eigsh  # lazy: `import tdkit` does not load scipy

    operator = LinearOperator((n, n), matvec=product, dtype=np.dtype(np.float64))
    start = np.random.default_rng(0).standard_normal(n)  # fixed, so that fits are deterministic
    values: np.ndarray
    vectors: np.ndarray
    values, vectors = eigsh(operator, k=rank, v0=start, tol=1e-12)
    order = np.argsort(values)[::-1]
    return torch.from_numpy(np.ascontiguousarray(vectors[:, order])), torch.from_numpy(values[order].copy())


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of `matrix` (m, n), descending, float64, from the smaller of its two Gram matrices."""
    matrix = working(matrix)
    small = matrix if matrix.shape[1] <= matrix.shape[0] else matrix.T
    squares: Tensor = torch.linalg.eigvalsh(small.T @ small)
    return squares.flip(0).clamp_min(0).sqrt()


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` approximation ``left @ right`` of `matrix` in the Frobenius norm.

    Each factor gets the square roots of the singular values, which keeps later training well conditioned. The
    matrix is projected onto the singular vectors of its smaller side, so that the product is exact at full rank.

    Args:
        matrix: (*batch, m, n), any float dtype.
        rank: 1 <= rank <= min(m, n).

    Returns:
        left (*batch, m, rank) and right (*batch, rank, n), float64.

    Source: Eckart and Young (1936).
    """
    matrix = working(matrix)
    if matrix.shape[-1] > matrix.shape[-2]:
        right, left = truncated(matrix.mT, rank)
        return left.mT, right.mT
    vectors, values = principal(matrix, rank)
    root = values.maximum(values[..., :1] * 1e-8 + torch.finfo(values.dtype).tiny).sqrt()
    return (matrix @ vectors) / root[..., None, :], vectors.mT * root[..., :, None]


def orthogonal_split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same approximation as `truncated`, with orthonormal columns in `left`.

    Args:
        matrix: (m, n) float64.
        rank: 1 <= rank <= min(m, n).

    Returns:
        left (m, rank) and right (rank, n), float64.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        left, _ = principal(matrix.T, rank)
        return left, left.T @ matrix
    vectors, _ = principal(matrix, rank)
    left, triangle = torch.linalg.qr(matrix @ vectors)
    return left, triangle @ vectors.T


def rearrange(matrix: Tensor, a: Shape, b: Shape) -> Tensor:
    """Rearrange `matrix` so that a Kronecker product becomes an outer product.

    ``rearrange(kron(A, B)) == outer(A.flatten(), B.flatten())``.

    Args:
        matrix: (a[0] * b[0], a[1] * b[1]).

    Returns:
        (a[0] * a[1], b[0] * b[1]), a copy.

    Source: Van Loan and Pitsianis (1993), section 2.
    """
    blocks = matrix.reshape(a[0], b[0], a[1], b[1]).transpose(1, 2)
    return blocks.reshape(a[0] * a[1], b[0] * b[1])


def restore(rearranged: Tensor, a: Shape, b: Shape) -> Tensor:
    """The inverse of `rearrange`: (a[0] * a[1], b[0] * b[1]) to (a[0] * b[0], a[1] * b[1])."""
    blocks = rearranged.reshape(a[0], a[1], b[0], b[1]).transpose(1, 2)
    return blocks.reshape(a[0] * b[0], a[1] * b[1])


def nearest_kronecker(matrix: Tensor, a: Shape, b: Shape, terms: int) -> tuple[Tensor, Tensor]:
    """The sum of `terms` Kronecker products nearest to `matrix` in the Frobenius norm.

    Returns:
        A (terms, *a) and B (terms, *b), float64.

    Source: Van Loan and Pitsianis (1993), section 3.
    """
    left, right = truncated(rearrange(working(matrix), a, b), terms)
    return left.T.reshape(terms, *a).contiguous(), right.reshape(terms, *b).contiguous()


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """``|weight - approximation| / |weight|`` in the Frobenius norm; 0 for two zero matrices."""
    weight, approximation = working(weight), working(approximation)
    size = torch.linalg.matrix_norm(weight)
    gap = torch.linalg.matrix_norm(weight - approximation)
    return float(gap / size) if size > 0 else float(gap)
