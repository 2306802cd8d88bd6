"""The metric tr(S (W - What) C (W - What)^T): the error that calibrated fits minimise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.errors import CalibrationError
from tdkit.fitting.linalg import working
from tdkit.shapes import Shape, by

# Shares of the mean diagonal. Tuned by hand; `python tests/benchmarks/accuracy.py --run FOLDER` measures a change.
INPUT_RIDGE = 1e-5  # added to C
OUTPUT_RIDGE = 1e-4  # added to S


@dataclass(frozen=True, eq=False)
class Metric:
    """Second moments of a layer's inputs x and output gradients g. An absent one (None) is the identity.

    Measured moments are singular if there are fewer tokens than features, and a few directions can hold most of
    their trace. Errors are therefore measured with a ridge: a multiple of the identity, `INPUT_RIDGE` times the mean
    diagonal of C and `OUTPUT_RIDGE` times that of S, makes both positive definite. A moment whose trace is zero or
    negative counts as absent; one that is not finite raises a `CalibrationError` when it is used. `squared_error` is
    the objective of every calibrated fit.

    The metric of a stack of matrices, such as the experts of a layer, has moments (members, n, n), one for each
    member; errors are then sums over the members.

    Attributes:
        input: C = E[x x^T], (in, in), or its diagonal (in,), or (members, in, in) of a stack; any float dtype.
        output: S = E[g g^T], (out, out), or its diagonal (out,), such as the token frequencies of an embedding, or
            (members, out, out) of a stack.
    """

    input: Tensor | None = None
    output: Tensor | None = None

    def check(self, name: str, shape: Shape) -> None:
        """Check that the moments are those of a weight of `shape` (out, in, *kernel), or of a stack of matrices.

        Raises:
            CalibrationError: when they are of another weight; the message names the layer `name`.
        """
        sides = (
            ("inputs", self.input, math.prod(shape[1:]), shape[-1]),
            ("output gradients", self.output, shape[0], shape[1]),
        )
        for what, moment, size, inner in sides:
            right = {(size,), (size, size)} | ({(shape[0], inner, inner)} if len(shape) == 3 else set())
            if moment is not None and tuple(moment.shape) not in right:
                raise CalibrationError(
                    f"{name}: the moments of its {what} are {by(tuple(moment.shape))}, and its weight is {by(shape)}: "
                    "calibrate this model"
                )

    def of(self, members: int | slice) -> Metric:
        """The metric of one member of a stack, or of some of them; one without moments (members, n, n) is unchanged."""
        sides = (m if m is None or m.ndim < 3 else m[members] for m in (self.input, self.output))
        return Metric(*sides)

    def ridged_input(self) -> Tensor | None:
        """C plus its ridge, float64, in its shape; None if it is absent."""
        return ridged(self.input, INPUT_RIDGE)

    def ridged_output(self) -> Tensor | None:
        """S plus its ridge, float64, in its shape; None if it is absent."""
        return ridged(self.output, OUTPUT_RIDGE)

    def squared_error(self, difference: Tensor) -> float:
        """tr(S D C D^T) for the difference D = W - What, (out, in), any float dtype.

        Those of a stack are (members, out, in) or (members, out * in).
        """
        difference = working(difference)
        return max(float((difference * self.weighted(difference)).sum()), 0.0)

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """sqrt(tr(S D C D^T) / tr(S W C W^T)) for D = W - What: the relative Frobenius error, in the metric."""
        size = self.squared_error(weight)
        gap = self.squared_error(working(weight) - working(approximation))
        return float((gap / size) ** 0.5) if size > 0 else float(gap**0.5)

    def reordered(self, rows: Tensor, columns: Tensor) -> Metric:
        """The metric of ``W[rows][:, columns]``, for int64 orders ``rows`` (out,) and ``columns`` (in,)."""
        return Metric(_reordered(self.input, columns), _reordered(self.output, rows))

    def weighted(self, matrix: Tensor) -> Tensor:
        """S D C for D as in `squared_error`, with its shape, dtype and device."""
        sizes = [m.shape[-1] if m is not None and m.ndim == 3 else -1 for m in (self.output, self.input)]
        members = matrix if sizes == [-1, -1] else matrix.reshape(len(matrix), *sizes)
        return times_right(times_left(self.ridged_output(), members), self.ridged_input()).reshape(matrix.shape)


def _reordered(moment: Tensor | None, order: Tensor) -> Tensor | None:
    if moment is None:
        return None
    order = order.to(moment.device)
    return moment[order] if moment.ndim == 1 else moment[order][:, order]


def ridged(moment: Tensor | None, share: float) -> Tensor | None:
    """`moment` plus `share` times its mean diagonal, float64; None if it is absent or its trace is not positive.

    In a stack (members, n, n) each gets its own ridge, and one whose trace is not positive becomes the identity.

    Raises:
        CalibrationError: if the diagonal is not finite.
    """
    if moment is None:
        return None
    moment = working(moment)
    diagonal = moment if moment.ndim == 1 else moment.diagonal(dim1=-2, dim2=-1)
    ridge = share * diagonal.mean(-1, keepdim=True)
    if not bool(torch.isfinite(ridge).all()):
        raise CalibrationError(
            f"a second moment of {diagonal.shape[-1]} features holds NaN or infinite values: calibrate on batches "
            "whose activations and gradients are finite"
        )
    present = ridge > 0
    if not bool(present.any()):
        return None
    if moment.ndim == 1:
        return moment.clamp_min(0) + ridge
    raised = (moment + moment.mT) / 2 * present[..., None]
    raised.diagonal(dim1=-2, dim2=-1).add_(ridge.where(present, torch.ones_like(ridge)))
    return raised


def root_and_inverse(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a moment, and the inverse of that root.

    Args:
        moment: (*batch, n, n), positive definite, or its diagonal (n,); float64.

    Returns:
        Root and inverse root, each of the shape of `moment`. Eigenvalues below 1e-12 times the largest, which come
        from rounding, are raised to that value.
    """
    if moment.ndim == 1:
        return moment.sqrt(), moment.rsqrt()
    values, vectors = torch.linalg.eigh(moment)
    values = values.maximum(values[..., -1:] * 1e-12)[..., None, :]
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


def extended(moment: Tensor, extra: int, value: float) -> Tensor:
    """`moment` padded with `extra` rows and columns that are zero except for `value` on the diagonal."""
    if not extra:
        return moment
    if moment.ndim == 1:
        return F.pad(moment, (0, extra), value=value)
    larger = F.pad(moment, (0, extra, 0, extra))
    larger.diagonal()[-extra:] = value
    return larger


def factor_and_inverse(moment: Tensor) -> tuple[Tensor, Tensor]:
    """F with F^T F = `moment`, and the inverse of F, by Cholesky: faster than the symmetric root.

    Args:
        moment: as for `root_and_inverse`, which is the fallback if rounding made the moment indefinite.
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
    """``moment @ matrix``, for a moment that is a matrix, a stack, a diagonal or None (the identity)."""
    if moment is None:
        return matrix
    moment = moment.to(matrix)
    return moment[:, None] * matrix if moment.ndim == 1 else moment @ matrix


def times_right(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """``matrix @ moment``, for a moment that is a matrix, a stack, a diagonal or None (the identity)."""
    if moment is None:
        return matrix
    moment = moment.to(matrix)
    return matrix * moment if moment.ndim == 1 else matrix @ moment
