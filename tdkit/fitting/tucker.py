"""Tucker-2 fits W[o, m, t] = sum_ab U[o, a] G[a, b, t] V[m, b] in a calibrated metric.

For a given V the best U and G have a closed form, so only V is searched for: a higher-order SVD of the whitened
weight starts, L-BFGS refines. Without a bound on the rank of U it is the low-rank product of two one-dimensional
convolutions, with m = (in, height) and t the width.

Sources: De Lathauwer et al. (2000), sections 3 and 4; Kim et al. (2016), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.fitting.linalg import leading, working
from tdkit.fitting.metric import Metric
from tdkit.fitting.row_space import RowSpaceProblem, row_space_problem
from tdkit.fitting.spans import RepeatedSpan
from tdkit.fitting.tensorly_tucker import partial_tucker

STEPS = 20  # of L-BFGS: the start is within about 2% of the error that hundreds reach
HOOI_ENTRIES = 1 << 18  # of the weight up to which orthogonal iteration by TensorLy starts; above it takes seconds


@dataclass(frozen=True)
class Tucker2:
    """Factors of a weight (out, m, t); float64.

    Attributes:
        out: U (out, rank_out), orthonormal columns; None when the rank is not bounded and U is the identity.
        core: G (rank_out or out, rank_in, t).
        inner: V (m, rank_in), orthonormal columns.
    """

    out: Tensor | None
    core: Tensor
    inner: Tensor


def fit_tucker(
    weight: Tensor,  # (out, m, t)
    metric: Metric,
    rank_in: int,
    rank_out: int | None = None,
) -> Tucker2:
    """Factors What that minimise tr(S (W - What) C (W - What)^T) for W = `weight` as the matrix (out, m * t).

    The fit in a metric is never worse than the one without. The minimum is local; without a metric and a bound on
    the rank of U it is global.

    Args:
        weight: any float dtype.
        metric: S and C; with neither, the fit is that of the Frobenius norm.
        rank_in: columns of V, at most m.
        rank_out: columns of U, at most ``rank_in * t``; None or at least `out` for no bound.
    """
    out, m, t = weight.shape
    rank_out = None if rank_out is None or rank_out >= out else rank_out
    problem = _problem(weight, metric)
    if rank_in == m:
        inner = torch.eye(m, dtype=torch.float64, device=weight.device)
    else:
        plain = problem if _is_plain(metric) else _problem(weight, Metric())
        inner = problem.whiten([_basis(plain, t, rank_in, rank_out)])[0]
        if plain is not problem:
            whitened = _basis(problem, t, rank_in, rank_out)
            inner = min((whitened, inner), key=lambda start: problem.error([start], rank_out))
            inner = torch.linalg.qr(inner).Q
            refined = problem.refine([inner], rank_out, STEPS)[0]
            inner = min((refined, inner), key=lambda found: problem.error([found], rank_out))
    found = problem.solve([inner], rank_out)
    (inner,), x = problem.unwhiten([inner], found.x)
    inner, triangle = torch.linalg.qr(inner)
    core = triangle @ x.reshape(out, -1, t)
    if rank_out is None:
        return Tucker2(None, core, inner)
    left = _column_space(core.flatten(1), rank_out)
    return Tucker2(left, torch.tensordot(left.T, core, dims=1), inner)


def tucker_errors(
    weight: Tensor,  # (out, m, t)
    metric: Metric,
    ranks_in: Sequence[int],
) -> list[Tensor]:
    """Upper estimates of the squared error of `fit_tucker` for several `rank_in` and every `rank_out`.

    They are the errors of its closed-form start, for all ranks from one factorisation: the leading columns of one
    basis V serve every rank. Without a metric and for weights above `HOOI_ENTRIES` they are those of the fits.

    Returns:
        For each of `ranks_in` the errors (r,) for rank_out = 1 ... r, float64; r is the least of out and rank_in * t.
    """
    t = weight.shape[2]
    problem = _problem(weight, metric)
    basis = _leading_basis(problem, t, weight.shape[1])
    reached = problem.reached([basis])  # (m * t, out)
    found: list[Tensor] = []
    for rank in ranks_in:
        part = reached[: rank * t]
        small = part if part.shape[0] <= part.shape[1] else part.T
        squares = torch.linalg.eigvalsh(small @ small.T).flip(0).clamp_min(0)
        tails = squares.flip(0).cumsum(0).flip(0)
        missed = max(problem.size - float(part.square().sum()), 0.0)
        found.append(missed + torch.cat([tails[1:], tails.new_zeros(1)]))
    return found


def span_errors(weight: Tensor, metric: Metric) -> Tensor:
    """As `tucker_errors` without a bound on the rank of U: the errors (r,) for rank_in = 1 ... r, float64.

    Without a metric they are those of the fits. r is the least of m and out * t.
    """
    out, m, t = weight.shape
    problem = _problem(weight, metric)
    reached = problem.reached([_leading_basis(problem, t, m)])
    squares = reached.square().reshape(m, -1).sum(1)
    rest = max(problem.size - float(squares.sum()), 0.0)
    tails = squares.flip(0).cumsum(0).flip(0)  # summed from the smallest up: the last keep their digits
    return (torch.cat([tails[1:], tails.new_zeros(1)]) + rest)[: min(m, out * t)]


def _problem(weight: Tensor, metric: Metric) -> RowSpaceProblem:
    _, m, t = weight.shape
    return row_space_problem(weight.flatten(1), metric, RepeatedSpan(t), (m, t))


def _is_plain(metric: Metric) -> bool:
    return metric.ridged_input() is None and metric.ridged_output() is None


def _basis(problem: RowSpaceProblem, t: int, rank_in: int, rank_out: int | None) -> Tensor:
    """V (m, rank_in) of the whitened weight: higher-order orthogonal iteration where it pays, else higher-order SVD."""
    if rank_out is None or problem.weight.numel() > HOOI_ENTRIES or not problem.size > 0:
        return _leading_basis(problem, t, rank_in)
    tensor = problem.weight.reshape(len(problem.weight), -1, t)
    return partial_tucker(tensor, (rank_out, rank_in))[1]


def _leading_basis(problem: RowSpaceProblem, t: int, rank_in: int) -> Tensor:
    unfolded = problem.weight.reshape(len(problem.weight), -1, t).transpose(0, 1).flatten(1)
    return leading(unfolded @ unfolded.T, rank_in)[0]


def _column_space(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (m, rank) that span those of a matrix of at most this rank."""
    matrix = working(matrix)
    if matrix.shape[1] > rank:
        return leading(matrix @ matrix.T, rank)[0]
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis
