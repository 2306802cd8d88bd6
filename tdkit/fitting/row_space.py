"""Fits of W = X Z^T in a calibrated metric, where Z is structured and X is eliminated (variable projection).

The factors of a convolution's weight (out, in, *kernel) have this form: the columns of Z (in * kernel, q) span the
rows of W, and X (out, q) is free, or of bounded rank. For a given Z the best X has a closed form. What remains is a
smooth function of the few parameters of Z, which L-BFGS minimises in whitened coordinates.

Source: Golub and Pereyra (1973).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdkit.fitting.kronecker_moments import Pairs, along_modes, whitening_modes
from tdkit.fitting.lbfgs import minimise
from tdkit.fitting.linalg import leading, working
from tdkit.fitting.metric import Metric, factor_and_inverse, times_left, times_right
from tdkit.fitting.spans import Parts, Span

Modes = tuple[int, ...]

# Tuned by hand for time and error together.
MAX_STEPS = 300
STEPS_TIMES_ENTRIES = 2**24
MIN_STEPS = 4
TOLERANCE = 1e-3  # relative, see `minimise`
HISTORY = 20
SINGLE_FROM = 1 << 17  # entries of the weight from which float32 is used,
SINGLE_ERROR = 3e-4  # if the relative squared error at the start is at least this: below, float32 is too inexact
RIDGES = {torch.float32: 1e-6, torch.float64: 1e-13}  # share of each diagonal entry added to the system for X
DAMPING = 0.05  # share of the mean curvature added to every curvature before it is inverted


@dataclass(frozen=True)
class Solution:
    """The best X for a given Z, with the products that the gradient needs.

    Attributes:
        x: (out, q).
        factor: (out, rank) with orthonormal columns and ``x = factor @ (factor.T @ x)``; None without a rank bound.
        moved: C Z, (n, q).
        value: tr((W - X Z^T) C (W - X Z^T)^T) in whitened coordinates.
    """

    x: Tensor
    factor: Tensor | None
    moved: Tensor
    value: float


@dataclass(frozen=True)
class RowSpaceProblem:
    """``tr(S (W - X Z^T) C (W - X Z^T)^T)`` in coordinates where S is the identity and C is near to it.

    Attributes:
        span: the structure of Z.
        weight: W, whitened on both sides, (out, n); float64 like all tensors here.
        weighted: W C, whitened, (out, n).
        input: C, whitened by the nearest Kronecker product over the modes: (n, n), or (n,); None for the identity.
        output: the inverse of the factor that whitened the rows, (out, out) or (out,); None for the identity.
        modes: sizes of the modes of the columns, whose product is n.
        pairs: per mode the factor that whitened it and the inverse; None for the identity.
        size: tr(S W C W^T).
    """

    span: Span
    weight: Tensor
    weighted: Tensor
    input: Tensor | None
    output: Tensor | None
    modes: Modes
    pairs: Pairs | None
    size: float

    def solve(
        self, parts: Sequence[Tensor], rank: int | None = None, *, ridge: float = RIDGES[torch.float64]
    ) -> Solution:
        """The X that is best for the parts of Z, of at most `rank`.

        The objective holds a ridge, a share of the squared norms of the terms that the columns of X and Z make.
        """
        wanted, moved, system = self._normal_equations(parts)
        tiny = torch.finfo(system.dtype).tiny
        system.diagonal().mul_(1 + ridge).add_(tiny)
        lower, failed = torch.linalg.cholesky_ex(system)
        if int(failed):
            inverse = torch.linalg.pinv(system, hermitian=True)
            x = wanted @ inverse
        else:
            x = torch.cholesky_solve(wanted.T, lower).T
        factor = None
        if rank is not None and rank < min(wanted.shape):
            gram = wanted @ x.T
            factor, squares = leading(((gram + gram.T) / 2).to(torch.float64), rank)
            factor = factor.to(x)
            x = factor @ (factor.T @ x)
            value = self.size - float(squares.sum())
        else:
            value = self.size - float((wanted * x).sum(dtype=torch.float64))
        return Solution(x, factor, moved, max(value, 0.0))

    def reached(self, parts: Sequence[Tensor]) -> Tensor:
        """A matrix (q, out) whose first rows, for any number of them, tell what as many columns of Z reach.

        With Y these rows, the least objective for the columns is ``size - |Y|^2``, and with a bound on the rank of X
        the singular values of Y take the place of all of it. The columns of Z must be linearly independent.
        """
        wanted, _, system = self._normal_equations(parts)
        ridge, lower, failed = RIDGES[torch.float64], system, 1
        while failed:  # rounding may leave a nearly singular system indefinite
            raised = system + torch.diag(ridge * system.diagonal() + torch.finfo(system.dtype).tiny)
            lower, info = torch.linalg.cholesky_ex(raised)
            ridge, failed = 100 * ridge, int(info)
        found: Tensor = torch.linalg.solve_triangular(lower, wanted.T, upper=False)
        return found

    def _normal_equations(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """W C Z (out, q), C Z (n, q) and Z^T C Z (q, q)."""
        wanted = self.span.times(self.weighted, parts)
        if self.input is not None and self.input.ndim == 2:
            moved = self.span.times(self.input, parts)
        else:
            moved = times_left(self.input, self.span.dense(parts))
        system = self.span.times(moved.T, parts)
        return wanted, moved, (system + system.T) / 2

    def error(self, parts: Sequence[Tensor], rank: int | None = None) -> float:
        """The least objective for the parts of Z and an X of at most `rank`."""
        return self.solve(parts, rank).value

    def refine(self, parts: Sequence[Tensor], rank: int | None, steps: int, ridge: float = 0.0) -> Parts:
        """Minimise over the parts of Z by at most `steps` L-BFGS steps.

        The computation is in float32 for weights of `SINGLE_FROM` entries and more, else in float64.

        Args:
            parts: where to start, float64.
            rank: upper bound on the rank of X; None for none.
            steps: upper bound on the steps; large weights get fewer.
            ridge: see `solve`; at least that of the dtype.

        Returns:
            The parts, float64.
        """
        start = self.solve(parts, rank, ridge=max(ridge, RIDGES[torch.float64]))
        most = min(steps, max(STEPS_TIMES_ENTRIES // self.weight.numel(), MIN_STEPS))
        if not start.value > 0 or not most:
            return list(parts)
        single = self.weight.numel() >= SINGLE_FROM and start.value >= SINGLE_ERROR * self.size
        dtype = torch.float32 if single else torch.float64
        problem, level = self._scaled(dtype), self.size**-0.5
        ridge = max(ridge, RIDGES[dtype])
        shapes, sizes = [part.shape for part in parts], [part.numel() for part in parts]

        def value_and_gradient(point: Tensor) -> tuple[float, Tensor]:
            now = [each.reshape(shape) for each, shape in zip(torch.split(point, sizes), shapes, strict=True)]
            found = problem.solve(now, rank, ridge=ridge)
            inner = found.x.T @ found.x
            inner.diagonal().mul_(1 + ridge)
            falls = problem.span.pullback(problem.weighted, found.x, now)
            rises = problem.span.pullback(found.moved.T, inner, now)
            slopes = [(rise - fall).reshape(-1) for fall, rise in zip(falls, rises, strict=True)]
            return found.value / 2, torch.cat(slopes)

        curvatures = self.span.curvatures((start.x * level).square().sum(0), parts)
        damped = [each + DAMPING * each.mean() for each in curvatures]
        found = minimise(
            value_and_gradient,
            torch.cat([part.reshape(-1) for part in parts]).to(dtype),
            scale=torch.cat([each.reciprocal().reshape(-1) for each in damped]).to(dtype),
            first_step=1 / len(parts),
            max_steps=most,
            tolerance=TOLERANCE,
        )
        split = torch.split(found.point.to(torch.float64), sizes)
        return [part.reshape(shape) for part, shape in zip(split, shapes, strict=True)]

    def whiten(self, parts: Sequence[Tensor]) -> Parts:
        """The parts that in whitened coordinates span the same rows as these do in the original ones."""
        if self.pairs is None:
            return list(parts)
        return [times_left(factor, part) for (factor, _), part in zip(self.pairs, parts, strict=False)]

    def unwhiten(self, parts: Sequence[Tensor], x: Tensor) -> tuple[Parts, Tensor]:
        """The parts and X of the weight in its original coordinates."""
        x = times_left(self.output, x)
        if self.pairs is None:
            return list(parts), x
        return self.span.unwhitened(parts, x, [inverse for _, inverse in self.pairs])

    def _scaled(self, dtype: torch.dtype) -> RowSpaceProblem:
        weight, weighted = ((matrix * self.size**-0.5).to(dtype) for matrix in (self.weight, self.weighted))
        inputs = None if self.input is None else self.input.to(dtype)
        return replace(self, weight=weight, weighted=weighted, input=inputs, size=1.0)


def row_space_problem(weight: Tensor, metric: Metric, span: Span, modes: Modes) -> RowSpaceProblem:
    """Whiten a weight (out, n) for fits in `metric`.

    Args:
        weight: any float dtype.
        metric: S and C.
        span: the structure of Z.
        modes: sizes of the modes of the columns, whose product is n.
    """
    weight = working(weight)
    inverse = None
    output = metric.ridged_output()
    if output is not None:
        factor, inverse = factor_and_inverse(output.to(weight.device))
        weight = times_left(factor, weight)
    inputs, pairs = whitening_modes(metric.ridged_input(), weight.shape[1], modes, weight.device)
    if inputs is not None and pairs is not None:
        weight = along_modes(weight.T, [factor for factor, _ in pairs]).T
        back = [inverse if inverse.ndim == 1 else inverse.T for _, inverse in pairs]
        inputs = (
            along_modes(inputs, [each.square() for each in back])
            if inputs.ndim == 1
            else along_modes(along_modes(inputs, back).T, back)
        )
    weighted = times_right(weight, inputs)
    return RowSpaceProblem(span, weight, weighted, inputs, inverse, modes, pairs, float((weight * weighted).sum()))
