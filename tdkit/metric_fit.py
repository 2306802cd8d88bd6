"""Trains of cores nearest to a matrix in a calibrated metric: a closed form where the moments are products of
small ones, then quasi-Newton steps in the coordinates which that closed form whitens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.linalg import working
from tdkit.metric import Metric, root_and_inverse, times_left, times_right
from tdkit.product_metric import along_modes, product_moments
from tdkit.quasi_newton import minimise
from tdkit.shapes import Shape
from tdkit.tensor_train import (
    Modes,
    bond_balanced,
    padded,
    truncated_train,
    tt_matrix,
    tt_pullback,
    tt_svd,
)

MAX_STEPS = 100
LARGE = 1 << 19  # entries from which the steps are few, for time: each costs a product with both moments
LARGE_STEPS = 12
TOLERANCE = 3e-3  # of the error, over a few steps
CURVE_STEPS = 5  # where a matrix is small they cost nothing, and there are as many as in a fit
SMALL = 1 << 16
DAMPING = 0.05  # of a bond's mean singular value: weak terms are not moved at once by their full Newton step
SINGLE_FROM = 1 << 17  # entries from which the steps are taken in float32


def fit_train(
    weight: Tensor,
    metric: Metric,
    ranks: Sequence[int],
    out_modes: Modes,
    in_modes: Modes,
    *,
    steps: int = MAX_STEPS,
) -> list[Tensor]:
    """Cores that make tr(S (W - What) C (W - What)^T) small, never larger than those of the plain TT-SVD.

    The moments are replaced by the nearest Kronecker products of small ones, S_1 kron ... kron S_d and
    C_1 kron ... kron C_d, for which whitening is exact: multiplied by their roots the weight stays a train of
    the same ranks, and its TT-SVD is the fit. From there (or from the plain fit, where that is nearer)
    L-BFGS descends on the true metric, in the whitened coordinates and scaled by the bonds' singular values.

    Args:
        weight: (out, in), any float dtype.
        metric: S and C.
        ranks: (cores + 1), the outer two are 1.
        out_modes, in_modes: may span more than the weight, which is then padded.
        steps: at most so many, and at most `LARGE_STEPS` for a large weight; 0 gives the closed form.

    Returns:
        cores (rank, out mode, in mode, next rank), float64, bonds balanced.
    """
    problem = whitened_problem(weight, metric, out_modes, in_modes)
    plain = problem.whiten(tt_svd(weight, ranks, out_modes, in_modes))
    closed = tt_svd(problem.weight, ranks, out_modes, in_modes)
    start, error = min(((cores, problem.error(cores)) for cores in (closed, plain)), key=lambda pair: pair[1])
    refined, _ = problem.refine(start, min(steps, LARGE_STEPS) if weight.numel() >= LARGE else steps)
    if problem.error(refined) > error:  # by rounding, where nothing was left to gain
        refined = start
    return bond_balanced(problem.unwhiten(refined))[0]


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
    problem = whitened_problem(weight, metric, out_modes, in_modes)
    largest, _ = bond_balanced(tt_svd(problem.weight, ranks[-1], out_modes, in_modes))
    starts = [truncated_train(largest, each) for each in ranks]
    steps = CURVE_STEPS if weight.numel() >= SMALL else MAX_STEPS
    return [problem.refine(start, steps)[1] for start in starts]


@dataclass(frozen=True)
class WhitenedProblem:
    """``tr(S (W - What) C (W - What)^T)`` in coordinates where S and C are near the identity; all float64.

    Attributes:
        weight: W, padded and whitened, (rows, columns) that the modes span.
        output, input: S and C of the whitened coordinates, diagonal where they were; None for the identity.
        out_roots, in_roots: for each core the root and inverse root that whitened its modes; None likewise.
        size: tr(S W C W^T).
    """

    weight: Tensor
    output: Tensor | None
    input: Tensor | None
    out_roots: list[tuple[Tensor, Tensor]] | None
    in_roots: list[tuple[Tensor, Tensor]] | None
    size: float

    def error(self, cores: Sequence[Tensor]) -> float:
        """The objective at whitened cores."""
        gap = self.weight - tt_matrix(cores)
        return max(float((gap * self._weighted(gap)).sum()), 0.0)

    def whiten(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Cores of What to cores of the whitened What."""
        return self._apply(cores, 0)

    def unwhiten(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `whiten`."""
        return self._apply(cores, 1)

    def refine(self, cores: Sequence[Tensor], steps: int) -> tuple[list[Tensor], float]:
        """Cores after at most `steps` quasi-Newton steps on the objective, and its value there.

        Matrices of `SINGLE_FROM` entries and more are refined, and the value computed, in float32.
        """
        if not self.size > 0 or len(cores) == 1:
            return list(cores), self.error(cores)
        cores, spectra = bond_balanced(cores)
        dtype = torch.float32 if self.weight.numel() >= SINGLE_FROM else torch.float64
        level = self.size**-0.5
        share = level ** (1 / len(cores))
        problem = WhitenedProblem(
            (self.weight * level).to(dtype),
            None if self.output is None else self.output.to(dtype),
            None if self.input is None else self.input.to(dtype),
            None,
            None,
            1.0,
        )
        sizes = [core.numel() for core in cores]
        shapes = [core.shape for core in cores]

        def value_and_gradient(point: Tensor) -> tuple[float, Tensor]:
            parts = [part.reshape(shape) for part, shape in zip(torch.split(point, sizes), shapes, strict=True)]
            gap = problem.weight - tt_matrix(parts)
            weighted = problem._weighted(gap)
            slopes = tt_pullback(parts, weighted)
            return float((gap * weighted).sum()) / 2, -torch.cat([slope.reshape(-1) for slope in slopes])

        found = minimise(
            value_and_gradient,
            torch.cat([(core * share).reshape(-1) for core in cores]).to(dtype),
            scale=_newton_scale(shapes, [values * level ** (2 / len(cores)) for values in spectra]).to(dtype),
            first_step=1 / len(cores),
            max_steps=steps,
            tolerance=TOLERANCE,
        )
        parts = torch.split(found.point.to(torch.float64), sizes)
        refined = [part.reshape(shape) / share for part, shape in zip(parts, shapes, strict=True)]
        return refined, 2 * found.values[-1] * self.size

    def _weighted(self, gap: Tensor) -> Tensor:
        return times_right(times_left(self.output, gap), self.input)

    def _apply(self, cores: Sequence[Tensor], which: int) -> list[Tensor]:
        changed = []
        for k, core in enumerate(cores):
            if self.out_roots is not None:
                core = along_modes(core.transpose(0, 1), [self.out_roots[k][which]]).transpose(0, 1)
            if self.in_roots is not None:
                core = along_modes(core.transpose(0, 2), [self.in_roots[k][which]]).transpose(0, 2)
            changed.append(core)
        return changed


def whitened_problem(weight: Tensor, metric: Metric, out_modes: Modes, in_modes: Modes) -> WhitenedProblem:
    """The problem of `fit_train` in whitened coordinates; see there for the arguments."""
    rows, columns = weight.shape
    weight = padded(working(weight), out_modes, in_modes)
    output, out_roots = _whitened_moment(metric.ridged_output(), rows, out_modes, weight.device)
    inputs, in_roots = _whitened_moment(metric.ridged_input(), columns, in_modes, weight.device)
    if out_roots is not None:
        weight = along_modes(weight, [root for root, _ in out_roots])
    if in_roots is not None:
        weight = along_modes(weight.T, [root for root, _ in in_roots]).T
    size = float((weight * times_right(times_left(output, weight), inputs)).sum())
    return WhitenedProblem(weight, output, inputs, out_roots, in_roots, size)


def _whitened_moment(
    moment: Tensor | None, size: int, modes: Modes, device: torch.device
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]] | None]:
    extra = math.prod(modes) - size
    if moment is None:
        if not extra:
            return None, None
        moment = torch.ones(size, dtype=torch.float64)  # the identity inside, nothing in the padding
    moment = moment.to(device)
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    filled = _extended(moment, extra, float(diagonal.mean()))  # the padding must not look like a small direction
    roots = [root_and_inverse(small) for small in product_moments(filled, modes)]
    inverses = [inverse for _, inverse in roots]
    whitened = along_modes(_extended(moment, extra, 0.0), inverses)  # but errors in the padding count nothing
    if moment.ndim == 1:
        return along_modes(whitened[:, None], inverses)[:, 0], roots
    return along_modes(whitened.T, inverses), roots


def _extended(moment: Tensor, extra: int, value: float) -> Tensor:
    """`moment` with `extra` more entries of `value` on its diagonal."""
    if not extra:
        return moment
    if moment.ndim == 1:
        return F.pad(moment, (0, extra), value=value)
    extended = F.pad(moment, (0, extra, 0, extra))
    extended.diagonal()[-extra:] = value
    return extended


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
