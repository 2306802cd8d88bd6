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

from tdkit.fitting.linalg import leading, principal, working
from tdkit.fitting.metric import Metric
from tdkit.fitting.row_space import RowSpaceProblem, row_space_problem
from tdkit.fitting.spans import RepeatedSpan
from tdkit.fitting.tensorly_tucker import partial_tucker

STEPS = 20  # of L-BFGS: the start is within about 2% of the error that hundreds reach
CURVE_STEPS = 8  # as many for error curves
CURVE_WORK = 2**34  # multiply-adds of the steps for one point of an error curve; about a second of one core
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


@dataclass(frozen=True)
class TuckerErrors:
    """Squared errors of `fit_tucker` for many ranks, from one problem: the columns of one basis V serve every rank_in.

    Attributes:
        problem: the whitened weight.
        kernel: t, the last size of the weight.
        basis: V of the closed-form start of the fits, (m, most), leading columns first.
    """

    problem: RowSpaceProblem
    kernel: int
    basis: Tensor

    @classmethod
    def of(
        cls,
        weight: Tensor,  # (out, m, t)
        metric: Metric,
        most: int | None = None,
    ) -> TuckerErrors:
        """Set up for every rank_in up to `most`, or up to that which is exact, the least of m and out * t."""
        out, m, t = weight.shape
        problem = _problem(weight, metric)
        return cls(problem, t, _leading_basis(problem, t, min(m, out * t, most or m)))

    def bounds(self, ranks_in: Sequence[int]) -> list[Tensor]:
        """Upper estimates for several rank_in and every rank_out: the errors of the closed-form start.

        Without a metric and for weights above `HOOI_ENTRIES` they are those of the fits.

        Returns:
            For each of `ranks_in` the errors (r,) for rank_out = 1 ... r, float64; r is the least of out and
            rank_in * t.
        """
        reached = self.problem.reached([self.basis])  # (columns * t, out)
        found: list[Tensor] = []
        for rank in ranks_in:
            part = reached[: rank * self.kernel]
            small = part if part.shape[0] <= part.shape[1] else part.T
            squares = torch.linalg.eigvalsh(small @ small.T).flip(0).clamp_min(0)
            tails = squares.flip(0).cumsum(0).flip(0)
            missed = max(self.problem.size - float(part.square().sum()), 0.0)
            found.append(missed + torch.cat([tails[1:], tails.new_zeros(1)]))
        return found

    def span_bounds(self) -> Tensor:
        """As `bounds` without a bound on the rank of U: the errors (most,) for rank_in = 1 ... most, float64.

        Without a metric they are those of the fits.
        """
        reached = self.problem.reached([self.basis])
        squares = reached.square().reshape(self.basis.shape[1], -1).sum(1)
        rest = max(self.problem.size - float(squares.sum()), 0.0)
        tails = squares.flip(0).cumsum(0).flip(0)  # summed from the smallest up: the last keep their digits
        return torch.cat([tails[1:], tails.new_zeros(1)]) + rest

    def refined(self, rank_in: int, rank_out: int | None = None) -> float | None:
        """The error after `CURVE_STEPS` from the closed form, some 3% above that of the fit.

        Returns:
            None where these steps take more than `CURVE_WORK` multiply-adds.
        """
        out, n = self.problem.weight.shape
        if CURVE_STEPS * rank_in * self.kernel * n * (n + out) > CURVE_WORK:
            return None
        rank_out = None if rank_out is None or rank_out >= out else rank_out
        parts = self.problem.refine([self.basis[:, :rank_in]], rank_out, CURVE_STEPS)
        return self.problem.error(parts, rank_out)


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
    if rank_in <= unfolded.shape[1] < unfolded.shape[0]:  # by the smaller Gram matrix
        vectors, _ = principal(unfolded, rank_in)
        basis: Tensor = torch.linalg.qr(unfolded @ vectors).Q
        return basis
    return leading(unfolded @ unfolded.T, rank_in)[0]


def _column_space(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (m, rank) that span those of a matrix of at most this rank."""
    matrix = working(matrix)
    if matrix.shape[1] > rank:
        return leading(matrix @ matrix.T, rank)[0]
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis
