"""Variable projection: fits of W = (I kron B) X in a calibrated metric, with X eliminated.

A Kronecker sum whose second factors are vectors has this form, and so has a train that is nearly a low-rank product.
For a given B the best X is the solution of a small linear system that does not depend on the inputs' moment. The
remaining function of B is well conditioned in the whitened coordinates and is minimised by L-BFGS, in about a third
of the steps that B and X together take.

Source: Golub and Pereyra (1973).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.fitting.kronecker_moments import whitening_modes
from tdkit.fitting.lbfgs import minimise
from tdkit.fitting.linalg import principal, working
from tdkit.fitting.metric import Metric, factor_and_inverse, times_left, times_right
from tdkit.fitting.tensor_train import Modes, bond_balanced

# Tuned by hand for time and error together; `python tests/benchmarks/fits.py --parts seconds,objective` measures both.
LARGE = 1 << 20  # entries of the weight from which at most `LARGE_STEPS` are taken: each multiplies by S
LARGE_STEPS = 5
MAX_STEPS = 40
TOLERANCE = 1e-3  # relative, see `minimise`
SINGLE_FROM = 1 << 17  # entries of the weight from which float32 is used,
SINGLE_ERROR = 3e-4  # if the relative squared error at the start is at least this: below, float32 is too inexact
RIDGES = {torch.float32: 1e-7, torch.float64: 1e-14}  # share of the mean diagonal added to the system for X


@dataclass(frozen=True)
class BlockProblem:
    """``tr(S (W - (I kron B) X) C (W - (I kron B) X)^T)`` for W (blocks * p, n), B (p, rank), X (blocks * rank, n).

    Attributes:
        weight: W, zero-padded to a multiple of `blocks` rows; float64 like all tensors here.
        weighted: S W.
        output: S with zeros in the padding, or its diagonal; None for the identity.
        input: C (n, n), or its diagonal (n,); None for the identity.
        blocks: number of blocks of rows that share B.
        size: tr(S W C W^T).
        inverse: of the factor that whitens the p rows of a block, (p, p) or its diagonal (p,).
        basis: (p, ranks), orthonormal columns: the leading singular vectors of the whitened weight.
        values: (ranks,), the singular values, descending.
        energy: the squared Frobenius norm of the whitened weight.
    """

    weight: Tensor
    weighted: Tensor
    output: Tensor | None
    input: Tensor | None
    blocks: int
    size: float
    inverse: Tensor
    basis: Tensor
    values: Tensor
    energy: float

    def fit(self, rank: int, steps: int = MAX_STEPS) -> tuple[Tensor, Tensor, float]:
        """Minimise over B and X, from the leading `rank` columns of `basis`.

        Args:
            rank: of B, at most the number of columns of `basis`.
            steps: upper bound on the L-BFGS steps, besides `MAX_STEPS` (`LARGE_STEPS` for a large weight).

        Returns:
            B (p, rank) and X (blocks, rank, n), float64, and the objective.
        """
        tiny = torch.finfo(torch.float64).tiny
        level = (self.values[:rank] / max(self.size, tiny) ** 0.5).clamp_min(1e-8)
        start = self.basis[:, :rank]
        if not self.size > 0:
            return times_left(self.inverse, start), self.weight.new_zeros(self.blocks, rank, self.weight.shape[1]), 0.0
        missed = 1 - float(self.values[:rank].square().sum()) / max(self.energy, tiny)
        single = self.weight.numel() >= SINGLE_FROM and missed >= SINGLE_ERROR
        most = LARGE_STEPS if self.weight.numel() >= LARGE else MAX_STEPS
        reduced = _Reduced(self, level, torch.float32 if single else torch.float64)
        found = minimise(
            reduced.value_and_gradient,
            (start * level).reshape(-1).to(reduced.dtype),
            scale=torch.ones(start.numel(), dtype=reduced.dtype, device=start.device),
            first_step=1.0,
            max_steps=0 if self.output is None else min(steps, most),
            tolerance=TOLERANCE,
        )
        b, x = reduced.factors(found.point)
        return b, x, max(2 * found.values[-1], 0.0) * self.size


Solved = tuple[Tensor, Tensor, Tensor, Tensor]  # see `_Reduced._solve`


class _Reduced:
    """The objective divided by 2 * size, as a function of the whitened B only."""

    def __init__(self, problem: BlockProblem, level: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.blocks = problem.blocks
        self.level = level.to(dtype)
        self.inverse = problem.inverse.to(dtype)
        self.input = None if problem.input is None else problem.input.to(dtype)
        self.output = None if problem.output is None else problem.output.to(dtype)
        self.amplitude = problem.size**0.5
        self.rows = problem.weight.shape[0] // self.blocks
        self._last: tuple[Tensor, Solved] | None = None
        self.target = (problem.weighted / self.amplitude).to(dtype).reshape(self.blocks, self.rows, -1)

    def factors(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """B and the best X for it, undoing the scaling by `amplitude`; float64."""
        b, _, x, _ = self._last[1] if self._last is not None and self._last[0] is point else self._solve(point)
        return b.to(torch.float64), x.to(torch.float64) * self.amplitude

    def value_and_gradient(self, point: Tensor) -> tuple[float, Tensor]:
        solved = self._solve(point)
        self._last = point, solved  # `factors` usually needs the last point
        _, spread, x, wanted = solved
        weighted = times_right(x.flatten(0, 1), self.input)  # X C
        value = 0.5 - 0.5 * float((wanted * weighted).sum(dtype=torch.float64))
        moments = (x.flatten(0, 1) @ weighted.T).reshape(self.blocks, -1, self.blocks, x.shape[1])  # X_j C X_i^T
        slope = torch.zeros_like(spread[0, :, 0])
        for i, (target, block) in enumerate(zip(self.target, weighted.reshape(x.shape), strict=True)):
            slope += spread[i].flatten(1) @ moments[:, :, i].reshape(-1, x.shape[1]) - target @ block.T
        adjoint = self.inverse if self.inverse.ndim == 1 else self.inverse.T
        return value, (times_left(adjoint, slope) / self.level).reshape(-1)

    def _solve(self, point: Tensor) -> Solved:
        """B, S (I kron B) as (block, row, block, rank), the best X (block, rank, n) and (I kron B)^T S W."""
        rank = len(self.level)
        b = times_left(self.inverse, point.reshape(self.rows, rank) / self.level)
        if self.output is not None and self.output.ndim == 2:
            spread = (self.output.reshape(-1, self.rows) @ b).reshape(self.blocks, self.rows, self.blocks, rank)
        else:
            spread = b.new_zeros(self.blocks, self.rows, self.blocks, rank)
            for i in range(self.blocks):
                own = None if self.output is None else self.output.reshape(self.blocks, self.rows)[i]
                spread[i, :, i] = times_left(own, b)
        system = (b.T @ spread.reshape(self.blocks, self.rows, -1)).reshape(self.blocks * rank, self.blocks * rank)
        system = (system + system.T) / 2
        system.diagonal().add_(RIDGES[self.dtype] * system.diagonal().mean())
        wanted = (b.T @ self.target).flatten(0, 1)
        lower, failed = torch.linalg.cholesky_ex(system)
        x = torch.linalg.pinv(system, hermitian=True) @ wanted if int(failed) else torch.cholesky_solve(wanted, lower)
        return b, spread, x.reshape(self.blocks, rank, -1), wanted


def block_problem(weight: Tensor, metric: Metric, blocks: int, rank: int, *, plain: bool = False) -> BlockProblem:
    """Set up the problem, with starting points for all ranks up to `rank`.

    The starting point is the closed form for the Kronecker product S_1 kron S_2 nearest to S.

    Args:
        weight: (m, n), any float dtype; zero-padded to a multiple of `blocks` rows.
        metric: S and C.
        blocks: number of blocks of rows that share B.
        rank: the largest rank that `fit` will be called with.
        plain: start from the closed form without a metric instead.
    """
    weight = working(weight)
    rows = -(-weight.shape[0] // blocks)
    padded = F.pad(weight, (0, 0, 0, blocks * rows - weight.shape[0]))
    output, pairs = whitening_modes(metric.ridged_output(), weight.shape[0], (blocks, rows), weight.device)
    inputs = metric.ridged_input()
    inputs = None if inputs is None else inputs.to(weight.device)
    inverse = torch.ones(rows, dtype=torch.float64, device=weight.device)
    whitened = padded
    if pairs is not None and not plain:
        (mixer, _), (factor, inverse) = pairs
        whitened = times_left(mixer, padded.reshape(blocks, -1)).reshape(blocks, rows, -1)
        whitened = torch.stack([times_left(factor, block) for block in whitened])
    if inputs is not None and not plain:
        far, _ = factor_and_inverse(inputs)
        whitened = times_right(whitened.reshape(blocks * rows, -1), far if far.ndim == 1 else far.T)
    stacked = whitened.reshape(blocks, rows, -1).transpose(0, 1).flatten(1)  # (p, blocks * n)
    if stacked.shape[0] <= stacked.shape[1]:
        basis, values = principal(stacked.T, rank)
    else:
        vectors, values = principal(stacked, rank)
        basis = torch.linalg.qr(stacked @ vectors).Q
    weighted = times_left(output, padded)
    size = float((padded * times_right(weighted, inputs)).sum())
    energy = float(stacked.square().sum())
    return BlockProblem(padded, weighted, output, inputs, blocks, size, inverse, basis, values, energy)


@dataclass(frozen=True)
class BlockForm:
    """A tensor train of the form (I kron B) X, or whose transpose has that form.

    One core carries all columns, the bonds before it have full rank, and exactly one core follows it.

    Attributes:
        core: index of the core that carries the columns.
        blocks: product of the out modes up to and including that core.
        rank: of the bond after that core.
        ranks, out_modes, in_modes: of the train, or of its transpose if `transposed`.
        transposed: whether the transpose of the train has the form.
    """

    core: int
    blocks: int
    rank: int
    ranks: Modes
    out_modes: Modes
    in_modes: Modes
    transposed: bool

    @classmethod
    def of(cls, weight: Tensor, ranks: Sequence[int], out_modes: Modes, in_modes: Modes) -> BlockForm | None:
        """The form of a train for `weight`; None if it is not of this form."""
        rows, columns = weight.shape
        core = len(ranks) - 3
        for outs, ins, m, n in ((out_modes, in_modes, rows, columns), (in_modes, out_modes, columns, rows)):
            if core < 0 or ins[core] != n or math.prod(ins) != n or math.prod(outs) - m >= outs[-1]:
                continue
            blocks = math.prod(outs[: core + 1])
            full = all(ranks[k] == math.prod(outs[:k]) for k in range(core + 1))
            if full and -(-m // blocks) == outs[-1]:
                return cls(core, blocks, ranks[-2], tuple(ranks), outs, ins, outs is not out_modes)
        return None

    def problems(self, weight: Tensor, metric: Metric) -> list[BlockProblem]:
        """The problem; below `SINGLE_FROM` entries also one that starts from the plain fit, so as to be never worse."""
        starts = (False, True) if weight.numel() < SINGLE_FROM else (False,)
        if self.transposed:
            weight, metric = weight.T, Metric(metric.output, metric.input)
        return [block_problem(weight, metric, self.blocks, self.rank, plain=plain) for plain in starts]

    def fit(self, weight: Tensor, metric: Metric, steps: int) -> list[Tensor]:
        """Cores of the fit, as those of `fit_train`."""
        fits = [problem.fit(self.rank, steps) for problem in self.problems(weight, metric)]
        b, x, _ = min(fits, key=lambda fit: fit[2])
        cores = []
        for k in range(self.core):
            size = self.ranks[k] * self.out_modes[k]
            identity = torch.eye(size, dtype=b.dtype, device=b.device)
            cores.append(identity.reshape(self.ranks[k], self.out_modes[k], 1, size))
        middle = x.transpose(1, 2).reshape(self.ranks[self.core], self.out_modes[self.core], -1, self.rank)
        cores += [middle, b.T.reshape(self.rank, -1, 1, 1)]
        return bond_balanced([core.transpose(1, 2) for core in cores] if self.transposed else cores)[0]

    def errors(self, weight: Tensor, metric: Metric, ranks: Sequence[int], steps: int) -> list[float]:
        """Squared errors as those of `train_errors`, for each rank of the bond between X and B."""
        problems = self.problems(weight, metric)
        return [min(problem.fit(rank, steps)[2] for problem in problems) for rank in ranks]
