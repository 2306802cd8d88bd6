"""Trains of cores nearest to a matrix in a calibrated metric: a closed form where the moments are products of
small ones, then quasi-Newton steps in the coordinates which that closed form whitens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.fitting.kronecker_moments import Pairs, along_modes, whitening_modes
from tdkit.fitting.lbfgs import minimise
from tdkit.fitting.linalg import working
from tdkit.fitting.metric import Metric, times_left, times_right
from tdkit.fitting.tensor_train import Modes, bond_balanced, padded, truncated_train, tt_matrix, tt_pullback, tt_svd
from tdkit.fitting.variable_projection import LARGE, SINGLE_FROM, BlockForm
from tdkit.shapes import Shape

MAX_STEPS = 500
STEPS_ON = 2**26  # entries of the weight times steps, at most: the larger the weight, the fewer steps
TOLERANCE = 2e-4  # relative, see `minimise`
HISTORY = 30  # of the quasi-Newton steps; 10 need half as many steps again
SMALL = 1 << 16
CURVE_STEPS, SMALL_CURVE_STEPS = 3, 100  # the latter where a matrix is small and they cost little
DAMPING = 0.05  # of a bond's mean singular value: weak terms are not moved at once by their full Newton step


def fit_train(
    weight: Tensor,
    metric: Metric,
    ranks: Sequence[int],
    out_modes: Modes,
    in_modes: Modes,
    *,
    steps: int = MAX_STEPS,
) -> list[Tensor]:
    """Cores that make tr(S (W - What) C (W - What)^T) small.

    The moments are replaced by the nearest Kronecker products of small ones, S_1 kron ... kron S_d and
    C_1 kron ... kron C_d, for which whitening is exact: multiplied by their roots the weight stays a train of
    the same ranks, and its TT-SVD is the fit. Where the train is (I kron B) X, `block_fit` goes on from there;
    otherwise L-BFGS descends on the true metric, in the whitened coordinates and scaled by the bonds' singular
    values. Below `LARGE` entries it starts from the plain TT-SVD where that is nearer, so that the result is
    never worse than the plain fit.

    Args:
        weight: (out, in), any float dtype.
        metric: S and C.
        ranks: (cores + 1), the outer two are 1.
        out_modes, in_modes: may span more than the weight, which is then padded.
        steps: at most so many, fewer for a large weight; 0 gives the closed form.

    Returns:
        cores (rank, out mode, in mode, next rank), float64, bonds balanced.
    """
    form = BlockForm.of(weight, ranks, out_modes, in_modes)
    if form is not None:
        return form.fit(weight, metric, steps)
    problem = whitened_problem(weight, metric, out_modes, in_modes)
    start = tt_svd(problem.whitened_weight(), ranks, out_modes, in_modes)
    if weight.numel() < LARGE:
        plain = problem.whiten(tt_svd(weight, ranks, out_modes, in_modes))
        start = min(start, plain, key=problem.error)
    refined, first, last = problem.refine(start, min(steps, STEPS_ON // weight.numel() + 1))
    return bond_balanced(problem.unwhiten(refined if last < first else start))[0]


def kronecker_in_metric(
    weight: Tensor, metric: Metric, a: Shape, b: Shape, terms: int, *, steps: int = MAX_STEPS
) -> tuple[Tensor, Tensor]:
    """A sum of Kronecker products near `weight` in the metric: `fit_train` with two cores.

    Returns:
        A (terms, *a) and B (terms, *b), float64.
    """
    first, second = fit_train(weight, metric, (1, terms, 1), (a[0], b[0]), (a[1], b[1]), steps=steps)
    return first[0].permute(2, 0, 1), second[..., 0]


def train_errors(
    weight: Tensor, metric: Metric, ranks: Sequence[Sequence[int]], out_modes: Modes, in_modes: Modes
) -> list[float]:
    """The error that `fit_train` reaches at each of `ranks`, from above: after few steps from one closed form.

    Args:
        weight, metric, out_modes, in_modes: as for `fit_train`.
        ranks: for each fit (cores + 1) ranks, the largest last.
    """
    steps = CURVE_STEPS if weight.numel() >= SMALL else SMALL_CURVE_STEPS
    forms = [BlockForm.of(weight, each, out_modes, in_modes) for each in ranks]
    blocks = [form for form in forms if form is not None]
    found = iter(blocks[-1].errors(weight, metric, [form.rank for form in blocks], steps) if blocks else [])
    others = [each for each, form in zip(ranks, forms, strict=True) if form is None]
    if others:
        problem = whitened_problem(weight, metric, out_modes, in_modes)
        largest, _ = bond_balanced(tt_svd(problem.whitened_weight(), others[-1], out_modes, in_modes))
        rest = iter([problem.refine(truncated_train(largest, each), steps)[2] for each in others])
    return [next(rest if form is None else found) for form in forms]


@dataclass(frozen=True)
class WhitenedProblem:
    """``tr(S (W - What) C (W - What)^T)`` for trains given in coordinates where S and C are near the identity.

    Attributes:
        weight: W, padded, (rows, columns) that the modes span; float64 as all that follows.
        output, input: S and C, zero in the padding, diagonal where they were; None for the identity.
        out_factors, in_factors: for each core the factor that whitens its modes, and its inverse; None likewise.
        size: tr(S W C W^T).
    """

    weight: Tensor
    output: Tensor | None
    input: Tensor | None
    out_factors: Pairs | None
    in_factors: Pairs | None
    size: float

    def error(self, cores: Sequence[Tensor]) -> float:
        """The objective at whitened cores."""
        gap = self.weight - tt_matrix(self.unwhiten(cores))
        return max(float((gap * self._weighted(gap)).sum()), 0.0)

    def whitened_weight(self) -> Tensor:
        """W in the whitened coordinates."""
        weight = self.weight
        if self.out_factors is not None:
            weight = along_modes(weight, [factor for factor, _ in self.out_factors])
        if self.in_factors is not None:
            weight = along_modes(weight.T, [factor for factor, _ in self.in_factors]).T
        return weight

    def whiten(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Cores of What to cores of the whitened What."""
        return _on_modes(cores, *(_picked(pairs, 0) for pairs in (self.out_factors, self.in_factors)))

    def unwhiten(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `whiten`."""
        return _on_modes(cores, *(_picked(pairs, 1) for pairs in (self.out_factors, self.in_factors)))

    def refine(self, cores: Sequence[Tensor], steps: int) -> tuple[list[Tensor], float, float]:
        """Whitened cores after at most `steps` quasi-Newton steps on the objective, and its value before and after.

        Matrices of `SINGLE_FROM` entries and more are refined, and the values computed, in float32.
        """
        if not self.size > 0 or len(cores) == 1:
            error = self.error(cores)
            return list(cores), error, error
        cores, spectra = bond_balanced(cores)
        dtype = torch.float32 if self.weight.numel() >= SINGLE_FROM else torch.float64
        level = self.size**-0.5
        share = level ** (1 / len(cores))
        problem = self._scaled(level, dtype)
        outs, ins = (_picked(pairs, 1) for pairs in (problem.out_factors, problem.in_factors))
        adjoint = tuple(None if each is None else [f.T if f.ndim == 2 else f for f in each] for each in (outs, ins))
        sizes = [core.numel() for core in cores]
        shapes = [core.shape for core in cores]

        def value_and_gradient(point: Tensor) -> tuple[float, Tensor]:
            parts = [part.reshape(shape) for part, shape in zip(torch.split(point, sizes), shapes, strict=True)]
            plain = _on_modes(parts, outs, ins)
            gap = problem.weight - tt_matrix(plain)
            weighted = problem._weighted(gap)
            slopes = _on_modes(tt_pullback(plain, weighted), *adjoint)
            return float((gap * weighted).sum()) / 2, -torch.cat([slope.reshape(-1) for slope in slopes])

        found = minimise(
            value_and_gradient,
            torch.cat([(core * share).reshape(-1) for core in cores]).to(dtype),
            scale=_newton_scale(shapes, [values * level ** (2 / len(cores)) for values in spectra]).to(dtype),
            first_step=1 / len(cores),
            max_steps=steps,
            tolerance=TOLERANCE,
            history=HISTORY,
        )
        parts = torch.split(found.point.to(torch.float64), sizes)
        refined = [part.reshape(shape) / share for part, shape in zip(parts, shapes, strict=True)]
        return refined, 2 * found.values[0] * self.size, 2 * found.values[-1] * self.size

    def _weighted(self, gap: Tensor) -> Tensor:
        return times_right(times_left(self.output, gap), self.input)

    def _scaled(self, level: float, dtype: torch.dtype) -> WhitenedProblem:
        def cast(pairs: Pairs | None) -> Pairs | None:
            return None if pairs is None else [(factor.to(dtype), inverse.to(dtype)) for factor, inverse in pairs]

        output = None if self.output is None else self.output.to(dtype)
        inputs = None if self.input is None else self.input.to(dtype)
        weight = (self.weight * level).to(dtype)
        return WhitenedProblem(weight, output, inputs, cast(self.out_factors), cast(self.in_factors), 1.0)


def whitened_problem(weight: Tensor, metric: Metric, out_modes: Modes, in_modes: Modes) -> WhitenedProblem:
    """The problem of `fit_train` in whitened coordinates; see there for the arguments."""
    rows, columns = weight.shape
    weight = padded(working(weight), out_modes, in_modes)
    output, out_factors = whitening_modes(metric.ridged_output(), rows, out_modes, weight.device)
    inputs, in_factors = whitening_modes(metric.ridged_input(), columns, in_modes, weight.device)
    size = float((weight * times_right(times_left(output, weight), inputs)).sum())
    return WhitenedProblem(weight, output, inputs, out_factors, in_factors, size)


def _picked(pairs: Pairs | None, which: int) -> list[Tensor] | None:
    return None if pairs is None else [pair[which] for pair in pairs]


def _on_modes(cores: Sequence[Tensor], outs: list[Tensor] | None, ins: list[Tensor] | None) -> list[Tensor]:
    """Each core with its out mode multiplied by its matrix of `outs`, its in mode by that of `ins`."""
    changed = []
    for k, core in enumerate(cores):
        if outs is not None:
            core = along_modes(core.transpose(0, 1), [outs[k]]).transpose(0, 1)
        if ins is not None:
            core = along_modes(core.transpose(0, 2), [ins[k]]).transpose(0, 2)
        changed.append(core)
    return changed


def _newton_scale(shapes: Sequence[torch.Size], spectra: Sequence[Tensor]) -> Tensor:
    """For every entry of every core the inverse of its curvature in a balanced train, damped."""
    damped = [values + DAMPING * values.mean() for values in spectra]
    outer = damped[0].new_ones(1)
    bonds = [outer, *damped, outer]
    scales = []
    for k, shape in enumerate(shapes):
        curvature = bonds[k][:, None, None, None] * bonds[k + 1]
        scales.append(curvature.reciprocal().expand(shape).reshape(-1))
    return torch.cat(scales)
