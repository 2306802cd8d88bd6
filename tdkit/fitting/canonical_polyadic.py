"""Canonical polyadic fits W[o, i_1, ..., i_d] = sum_r A[o, r] B_1[i_1, r] ... B_d[i_d, r] in a calibrated metric.

A has a closed form for given B_k, so that only these are searched for.

Sources: Hitchcock (1927); Lebedev et al. (2015), section 3.2; variable projection, Golub and Pereyra (1973).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdkit.fitting.metric import Metric
from tdkit.fitting.row_space import SINGLE_FROM, RowSpaceProblem, row_space_problem
from tdkit.fitting.spans import KhatriRaoSpan, Parts

# Tuned by hand for time and error together on the convolutions of a trained network.
STEPS = 100  # of L-BFGS; twice as many lower the error by about 3%
CURVE_STEPS, LARGE_CURVE_STEPS = 20, 8  # the second for weights of `SINGLE_FROM` entries and more
RIDGE = 1e-6  # share of the squared norms of the terms added to the objective: none may grow while others cancel it


def fit_cp(
    weight: Tensor,  # (out, i_1, ..., i_d)
    metric: Metric,
    rank: int,
) -> list[Tensor]:
    """Factors of What that minimise tr(S (W - What) C (W - What)^T) for W = `weight` as a matrix (out, -1).

    The start is exact for the full rank: the leading singular triplets of all slices (out, i_1), in bases of the other
    modes from the higher-order SVD. (For ranks above the size of a mode, TensorLy's alternating least squares fills
    factors with random columns and ends at larger errors after a longer time.) L-BFGS refines it. Weights of less than
    `SINGLE_FROM` entries are never fitted worse than without a metric. The minimum is local.

    Args:
        weight: any float dtype.
        metric: S and C; with neither, the fit is that of the Frobenius norm.
        rank: number of terms, at most `full_rank`.

    Returns:
        A (out, rank) and B_k (i_k, rank), float64; in each term all have the same norm.
    """
    problem = _problem(weight, metric)
    parts = _refined(problem, rank, STEPS)
    if weight.numel() < SINGLE_FROM and not (problem.output is None and problem.pairs is None):
        plain = problem.whiten(_refined(_problem(weight, Metric()), rank, STEPS))
        again = problem.refine(plain, None, STEPS, ridge=RIDGE)
        parts = min((parts, plain, again), key=problem.error)
    parts, x = problem.unwhiten(parts, problem.solve(parts).x)
    return _balanced([x, *parts])


def cp_errors(weight: Tensor, metric: Metric, ranks: Sequence[int]) -> list[float]:
    """Upper estimates of the squared error of `fit_cp` at several ranks, after a few steps."""
    problem = _problem(weight, metric)
    steps = CURVE_STEPS if weight.numel() < SINGLE_FROM else LARGE_CURVE_STEPS
    return [problem.error(_refined(problem, rank, steps)) for rank in ranks]


def full_rank(shape: Sequence[int]) -> int:
    """A number of terms that every tensor (out, i_1, ..., i_d) is a sum of."""
    return min(shape[:2]) * math.prod(shape[2:])


def _problem(weight: Tensor, metric: Metric) -> RowSpaceProblem:
    return row_space_problem(weight.flatten(1), metric, KhatriRaoSpan(), tuple(weight.shape[1:]))


def _refined(problem: RowSpaceProblem, rank: int, steps: int) -> Parts:
    start = _start(problem, rank)
    refined = problem.refine(start, None, steps, ridge=RIDGE)
    return min((refined, start), key=problem.error)


def _start(problem: RowSpaceProblem, rank: int) -> Parts:
    """B_1 ... B_d from the leading singular triplets of the slices (out, i_1) of the whitened weight."""
    inner, *others = problem.modes
    tensor = problem.weight.reshape(-1, inner, *others)
    bases = []
    for axis, size in enumerate(others, start=2):
        unfolded = tensor.movedim(axis, 0).reshape(size, -1)
        bases.append(torch.linalg.eigh(unfolded @ unfolded.T)[1].flip(1))
        tensor = torch.tensordot(tensor, bases[-1], dims=([axis], [0])).movedim(-1, axis)
    slices = tensor.flatten(2).movedim(2, 0)
    _, values, vectors = torch.linalg.svd(slices, full_matrices=False)
    order = values.flatten().argsort(descending=True, stable=True)[:rank]
    which, triplet = order // values.shape[1], order % values.shape[1]
    parts = [vectors[which, triplet].T.contiguous()]
    stride = math.prod(others)
    for size, basis in zip(others, bases, strict=True):
        stride //= size
        parts.append(basis[:, (which // stride) % size].contiguous())
    return parts


def _balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same sum of terms, in each of which all factors have the same norm."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    level = norms.prod(0) ** (1 / len(factors))
    safe = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return [factor / norm * level for factor, norm in zip(factors, safe, strict=True)]
