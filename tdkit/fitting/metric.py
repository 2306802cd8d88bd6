"""The metric tr(S (W - What) C (W - What)^T) in which calibrated fits measure their error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.fitting.linalg import working

INPUT_RIDGE = 1e-5  # added to C, as a share of its mean diagonal
OUTPUT_RIDGE = 1e-4  # added to S, likewise


@dataclass(frozen=True, eq=False)
class Metric:
    """Second moments of a layer's inputs and output gradients; either may be absent (the identity).

    Moments come from finite text: they are rank-deficient where tokens are fewer than features, and a few
    directions can hold most of their trace. Errors are therefore measured with ridged moments, C plus
    `INPUT_RIDGE` of its mean diagonal and S plus `OUTPUT_RIDGE` of its own, which are positive definite.
    A moment that is zero, or not positive anywhere, counts as absent. Every fit minimises exactly what
    `squared_error` measures.

    Attributes:
        input: C = E[x x^T], (in, in), or (in,) when only its diagonal is kept.
        output: S = E[g g^T], (out, out), or (out,) its diagonal (token counts of an embedding).
    """

    input: Tensor | None = None
    output: Tensor | None = None

    def ridged_input(self) -> Tensor | None:
        """C with its ridge, float64; None when absent."""
        return ridged(self.input, INPUT_RIDGE)

    def ridged_output(self) -> Tensor | None:
        """S with its ridge, float64; None when absent."""
        return ridged(self.output, OUTPUT_RIDGE)

    def squared_error(self, difference: Tensor) -> float:
        """tr(S D C D^T) for D = W - What, (out, in)."""
        difference = working(difference)
        return max(float((difference * self.weighted(difference)).sum()), 0.0)

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """sqrt(tr(S D C D^T) / tr(S W C W^T)), the metric's counterpart of the relative Frobenius error."""
        size = self.squared_error(weight)
        gap = self.squared_error(working(weight) - working(approximation))
        return float((gap / size) ** 0.5) if size > 0 else float(gap**0.5)

    def reordered(self, rows: Tensor, columns: Tensor) -> Metric:
        """The metric of ``W[rows][:, columns]``."""
        return Metric(_reordered(self.input, columns), _reordered(self.output, rows))

    def weighted(self, matrix: Tensor) -> Tensor:
        """S D C for a matrix D (out, in), in its dtype and on its device."""
        return times_right(times_left(self.ridged_output(), matrix), self.ridged_input())


def _reordered(moment: Tensor | None, order: Tensor) -> Tensor | None:
    if moment is None:
        return None
    order = order.to(moment.device)
    return moment[order] if moment.ndim == 1 else moment[order][:, order]


def ridged(moment: Tensor | None, share: float) -> Tensor | None:
    """`moment` plus `share` of its mean diagonal, float64; None when it is absent or has no positive trace."""
    if moment is None:
        return None
    moment = working(moment)
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    ridge = share * diagonal.mean()
    if not bool(ridge > 0):
        return None
    if moment.ndim == 1:
        return moment.clamp_min(0) + ridge
    raised = (moment + moment.T) / 2
    raised.diagonal().add_(ridge)
    return raised


def root_and_inverse(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a ridged moment and its inverse.

    Args:
        moment: (n, n) positive definite, or (n,) the diagonal of one; float64.

    Returns:
        root and inverse root, each of the shape of `moment`. Eigenvalues that rounding left below 1e-12 of
        the largest are lifted to it.
    """
    if moment.ndim == 1:
        return moment.sqrt(), moment.rsqrt()
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(float(values[-1]) * 1e-12)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def extended(moment: Tensor, extra: int, value: float) -> Tensor:
    """`moment` with `extra` more entries of `value` on its diagonal."""
    if not extra:
        return moment
    if moment.ndim == 1:
        return F.pad(moment, (0, extra), value=value)
    larger = F.pad(moment, (0, extra, 0, extra))
    larger.diagonal()[-extra:] = value
    return larger


def factor_and_inverse(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Some F with F^T F = `moment`, and its inverse: by Cholesky, a fraction of the time of the symmetric root.

    Args:
        moment: as for `root_and_inverse`, whose answer this is where rounding made the moment indefinite.
    """
    if moment.ndim == 1:
        return root_and_inverse(moment)
    lower, failed = torch.linalg.cholesky_ex(moment)
    if int(failed):
        return root_and_inverse(moment)
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower.T, identity, upper=True)
    return lower.T, inverse


def times_left(moment: Tensor | None, matrix: Tensor) -> Tensor:
    """``moment @ matrix`` where the moment may be absent or a diagonal."""
    if moment is None:
        return matrix
    moment = moment.to(matrix)
    return moment[:, None] * matrix if moment.ndim == 1 else moment @ matrix


def times_right(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """``matrix @ moment`` where the moment may be absent or a diagonal."""
    if moment is None:
        return matrix
    moment = moment.to(matrix)
    return matrix * moment if moment.ndim == 1 else matrix @ moment
