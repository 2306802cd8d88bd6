"""Tensor-train and Kronecker fits in a calibrated metric: whitened TT-SVD, then L-BFGS in the whitened coordinates."""

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
from tdkit.support.threads import threads_for

# Tuned by hand for time and error together; `python tests/benchmarks/fits.py --parts seconds,objective` measures both.
MAX_STEPS = 500  # of L-BFGS
STEPS_TIMES_ENTRIES = 2**26  # upper bound on steps times entries of the weight: large weights get fewer steps
TOLERANCE = 2e-4  # relative, see `minimise`
HISTORY = 30  # pairs that L-BFGS keeps; with 10 it takes half as many steps again
SMALL = 1 << 16  # entries below which error curves take more steps:
CURVE_STEPS, SMALL_CURVE_STEPS = 3, 30
BLOCK_CURVE_STEPS = 10  # of a `BlockForm`; with 24 the loss of small models is 1% lower, and takes twice the time
DAMPING = 0.05  # share of a bond's mean singular value added to all of them before they are inverted


def fit_train(
    weight: Tensor,
    metric: Metric,
    ranks: Sequence[int],
    out_modes: Modes,
    in_modes: Modes,
    *,
    steps: int = MAX_STEPS,
) -> list[Tensor]:
    """Tensor-train cores of a matrix What that minimise tr(S (W - What) C (W - What)^T) for W = `weight`.

    The start is a closed form. With the moments replaced by the nearest Kronecker products of small ones,
    S_1 kron ... kron S_d and C_1 kron ... kron C_d, whitening keeps the ranks of a train, so the TT-SVD of the whitened
    weight is the fit. From there L-BFGS minimises the true objective, in the whitened coordinates and preconditioned by
    the singular values of the bonds. Trains of the form (I kron B) X are fitted by variable projection instead, see
    `BlockForm`. Weights of less than `LARGE` entries start from the plain TT-SVD if it has the smaller error, so that
    the result is never worse than the plain fit. The minimum is local.

    Args:
        weight: (out, in), any float dtype; zero-padded to the product of the modes.
        metric: S and C.
        ranks: cores + 1 numbers, of which the first and the last are 1.
        out_modes, in_modes: one per core; their products are at least out and in.
        steps: upper bound on the L-BFGS steps; large weights get fewer. 0 returns the closed form.

    Returns:
        Cores (rank, out mode, in mode, next rank), float64, with balanced bonds (see `bond_balanced`).
    """
    form = BlockForm.of(weight, ranks, out_modes, in_modes)
    with threads_for(weight.numel()):
        if form is not None:
            return form.fit(weight, metric, steps)
        problem = whitened_problem(weight, metric, out_modes, in_modes)
        start = tt_svd(problem.weight, ranks, out_modes, in_modes)
        if weight.numel() < LARGE:
            plain = problem.whiten(tt_svd(weight, ranks, out_modes, in_modes))
            start = min(start, plain, key=problem.error)
        refined, first, last = problem.refine(start, min(steps, STEPS_TIMES_ENTRIES // weight.numel() + 1))
        return bond_balanced(problem.unwhiten(refined if last < first else start))[0]


def kronecker_in_metric(
    weight: Tensor, metric: Metric, a: Shape, b: Shape, terms: int, *, steps: int = MAX_STEPS
) -> tuple[Tensor, Tensor]:
    """A sum of `terms` Kronecker products fitted in the metric: `fit_train` with two cores.

    Args:
        weight: (a[0] * b[0], a[1] * b[1]), any float dtype.
        metric: S and C.
        a, b: shapes of the factors.
        terms: their number.
        steps: as for `fit_train`.

    Returns:
        A (terms, *a) and B (terms, *b), float64.
    """
    first, second = fit_train(weight, metric, (1, terms, 1), (a[0], b[0]), (a[1], b[1]), steps=steps)
    return first[0].permute(2, 0, 1), second[..., 0]


def train_errors(
    weight: Tensor, metric: Metric, ranks: Sequence[Sequence[int]], out_modes: Modes, in_modes: Modes
) -> list[float]:
    """Upper estimates of the squared error of `fit_train` at several ranks, after a few steps from one closed form.

    Args:
        weight, metric, out_modes, in_modes: as for `fit_train`.
        ranks: of each fit, cores + 1 numbers; the largest last.

    Returns:
        tr(S (W - What) C (W - What)^T) per fit.
    """
    few = weight.numel() >= SMALL
    steps, block_steps = (CURVE_STEPS, CURVE_STEPS) if few else (SMALL_CURVE_STEPS, BLOCK_CURVE_STEPS)
    forms = [BlockForm.of(weight, each, out_modes, in_modes) for each in ranks]
    blocks = [form for form in forms if form is not None]
    others = [each for each, form in zip(ranks, forms, strict=True) if form is None]
    with threads_for(weight.numel()):
        found = iter(blocks[-1].errors(weight, metric, [form.rank for form in blocks], block_steps) if blocks else [])
        if others:
            problem = whitened_problem(weight, metric, out_modes, in_modes)
            largest, _ = bond_balanced(tt_svd(problem.weight, others[-1], out_modes, in_modes))
            rest = iter([problem.refine(truncated_train(largest, each), steps)[2] for each in others])
    return [next(rest if form is None else found) for form in forms]


@dataclass(frozen=True)
class WhitenedProblem:
    """``tr(S (W - What) C (W - What)^T)`` in whitened coordinates, in which S and C are near the identity.

    Attributes:
        weight: W, zero-padded to (product of out modes, product of in modes) and whitened; float64 like all tensors
            here.
        output, input: S and C with zeros in the padding, or their diagonals, whitened; None for the identity.
        out_factors, in_factors: per core the whitening factor of its mode and the inverse; None for the identity.
        size: tr(S W C W^T).
    """

    weight: Tensor
    output: Tensor | None
    input: Tensor | None
    out_factors: Pairs | None
    in_factors: Pairs | None
    size: float

    def error(self, cores: Sequence[Tensor]) -> float:
        """The objective for whitened cores."""
        gap = self.weight - tt_matrix(cores)
        return max(float((gap * times_right(times_left(self.output, gap), self.input)).sum()), 0.0)

    def whiten(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Multiply the modes of `cores` by the whitening factors."""
        return self._on_modes(cores, 0)

    def unwhiten(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `whiten`."""
        return self._on_modes(cores, 1)

    def _on_modes(self, cores: Sequence[Tensor], which: int) -> list[Tensor]:
        changed = list(cores)
        for axis, pairs in ((1, self.out_factors), (2, self.in_factors)):
            if pairs is not None:
                changed = [
                    along_modes(core.transpose(0, axis), [pair[which]]).transpose(0, axis)
                    for core, pair in zip(changed, pairs, strict=True)
                ]
        return changed

    def refine(self, cores: Sequence[Tensor], steps: int) -> tuple[list[Tensor], float, float]:
        """Minimise the objective by at most `steps` L-BFGS steps.

        The computation is in float32 for matrices of `SINGLE_FROM` entries and more, else in float64.

        Returns:
            The whitened cores, float64, and the objective before and after.
        """
        if not self.size > 0 or len(cores) == 1:
            error = self.error(cores)
            return list(cores), error, error
        cores, spectra = bond_balanced(cores)
        dtype = torch.float32 if self.weight.numel() >= SINGLE_FROM else torch.float64
        level = self.size**-0.5
        share = level ** (1 / len(cores))
        weight = (self.weight * level).to(dtype)
        output, inputs = (None if each is None else each.to(dtype) for each in (self.output, self.input))
        sizes = [core.numel() for core in cores]
        shapes = [core.shape for core in cores]

        def value_and_gradient(point: Tensor) -> tuple[float, Tensor]:
            parts = [part.reshape(shape) for part, shape in zip(torch.split(point, sizes), shapes, strict=True)]
            gap = weight - tt_matrix(parts)
            weighted = times_right(times_left(output, gap), inputs)
            slopes = tt_pullback(parts, weighted)
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


def whitened_problem(weight: Tensor, metric: Metric, out_modes: Modes, in_modes: Modes) -> WhitenedProblem:
    """The objective of `fit_train`, whose arguments these are, in whitened coordinates."""
    rows, columns = weight.shape
    weight = padded(working(weight), out_modes, in_modes)
    output, out_factors = whitening_modes(metric.ridged_output(), rows, out_modes, weight.device)
    inputs, in_factors = whitening_modes(metric.ridged_input(), columns, in_modes, weight.device)
    size = float((weight * times_right(times_left(output, weight), inputs)).sum())
    if out_factors is not None:
        weight, output = along_modes(weight, _picked(out_factors, 0)), _whitened(output, out_factors)
    if in_factors is not None:
        weight, inputs = along_modes(weight.T, _picked(in_factors, 0)).T, _whitened(inputs, in_factors)
    return WhitenedProblem(weight, output, inputs, out_factors, in_factors, size)


def _whitened(moment: Tensor | None, pairs: Pairs) -> Tensor | None:
    """F^-T M F^-1 for a moment M, or its diagonal, and F the Kronecker product of the whitening factors."""
    if moment is None:
        return None
    inverses = [inverse if inverse.ndim == 1 else inverse.T for inverse in _picked(pairs, 1)]
    half = along_modes(moment, inverses)
    return along_modes(half, inverses) if moment.ndim == 1 else along_modes(half.T, inverses)


def _picked(pairs: Pairs, which: int) -> list[Tensor]:
    return [pair[which] for pair in pairs]


def _newton_scale(shapes: Sequence[torch.Size], spectra: Sequence[Tensor]) -> Tensor:
    """The inverse of the damped curvature of every entry of every core in a balanced train, flattened: (n,)."""
    damped = [values + DAMPING * values.mean() for values in spectra]
    outer = damped[0].new_ones(1)
    bonds = [outer, *damped, outer]
    scales = []
    for k, shape in enumerate(shapes):
        curvature = bonds[k][:, None, None, None] * bonds[k + 1]
        scales.append(curvature.reciprocal().expand(shape).reshape(-1))
    return torch.cat(scales)
