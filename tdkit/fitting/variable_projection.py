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
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

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
        weighted: S W, as (p, blocks * n).
        target: S W C^(1/2), likewise.
        output: S with zeros in the padding, as (p, blocks, blocks, p): row, block, other block, other row; or its
            diagonal (p, blocks).
        blocks: number of blocks of rows that share B.
        size: tr(S W C W^T).
        exact: whether S is the identity, so that the starting point is the minimum.
        inverse: of the factor that whitens the p rows of a block, (p, p) or its diagonal (p,).
        basis: (p, ranks), orthonormal columns: the leading singular vectors of the whitened weight.
        values: (ranks,), the singular values, descending.
        energy: the squared Frobenius norm of the whitened weight.
        known: by (rank, steps), what `error` has returned.
    """

    weight: Tensor
    weighted: Tensor
    target: Tensor
    output: Tensor
    blocks: int
    size: float
    exact: bool
    inverse: Tensor
    basis: Tensor
    values: Tensor
    energy: float
    known: dict[tuple[int, int], float] = field(default_factory=dict, repr=False)

    def fit(self, rank: int, steps: int = MAX_STEPS) -> tuple[Tensor, Tensor, float]:
        """Minimise over B and X, from the leading `rank` columns of `basis`.

        Args:
            rank: of B, at most the number of columns of `basis`.
            steps: upper bound on the L-BFGS steps, besides `MAX_STEPS` (`LARGE_STEPS` for a large weight).

        Returns:
            B (p, rank) and X (blocks, rank, n), float64, and the objective.
        """
        b, error = self._minimum(rank, steps)
        x = _solved(b, self.output, self.weighted, self.blocks)[-1]
        return b, x.reshape(self.blocks, rank, -1), error

    def error(self, rank: int, steps: int) -> float:
        """The objective of `fit`."""
        if (rank, steps) not in self.known:
            self.known[rank, steps] = self._minimum(rank, steps)[1]
        return self.known[rank, steps]

    def _minimum(self, rank: int, steps: int) -> tuple[Tensor, float]:
        start = self.basis[:, :rank]
        if not self.size > 0:
            return times_left(self.inverse, start), 0.0
        tiny = torch.finfo(torch.float64).tiny
        level = (self.values[:rank] / max(self.size, tiny) ** 0.5).clamp_min(1e-8)
        missed = 1 - float(self.values[:rank].square().sum()) / max(self.energy, tiny)
        single = self.weight.numel() >= SINGLE_FROM and missed >= SINGLE_ERROR
        most = LARGE_STEPS if self.weight.numel() >= LARGE else MAX_STEPS
        reduced = _Reduced(self, level, torch.float32 if single else torch.float64)
        found = minimise(
            reduced.value_and_gradient,
            (start * level).reshape(-1).to(reduced.dtype),
            first_step=1.0,
            max_steps=0 if self.exact else min(steps, most),
            tolerance=TOLERANCE,
        )
        b = reduced.unwhitened(found.point).to(torch.float64)
        return b, max(2 * found.values[-1], 0.0) * self.size


class _Reduced:
    """The objective divided by 2 * size, as a function of the whitened B only.

    Whitened by C^(1/2) from the right, W and X need no product with C. Each of the other products is one call for all
    blocks: for small weights the number of calls is what takes the time.
    """

    def __init__(self, problem: BlockProblem, level: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.blocks = problem.blocks
        self.level = level.to(dtype)
        self.inverse = problem.inverse.to(dtype)
        self.adjoint = self.inverse if self.inverse.ndim == 1 else self.inverse.T
        self.output = problem.output.to(dtype)
        self.target = (problem.target / problem.size**0.5).to(dtype)

    def unwhitened(self, point: Tensor) -> Tensor:
        """B, (p, rank)."""
        return times_left(self.inverse, point.reshape(-1, len(self.level)) / self.level)

    def value_and_gradient(self, point: Tensor) -> tuple[float, Tensor]:
        rank = len(self.level)
        spread, wanted, x = _solved(self.unwhitened(point), self.output, self.target, self.blocks)
        value = 0.5 - 0.5 * float((wanted * x).sum(dtype=torch.float64))
        moments = (x @ x.mT).reshape(self.blocks, rank, -1, rank).permute(0, 2, 3, 1)  # X_j X_i^T for each block i
        rows = x.reshape(self.blocks, rank, -1).transpose(1, 2)
        slope = spread @ moments.reshape(-1, rank) - self.target @ rows.reshape(-1, rank)
        return value, (times_left(self.adjoint, slope) / self.level).reshape(-1)


def _solved(b: Tensor, output: Tensor, target: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best X for B, which solves (I kron B)^T S (I kron B) X = (I kron B)^T T.

    A diagonal S gives one system per block, a matrix one for all blocks.

    Args:
        b: B, (p, rank).
        output: S, as in `BlockProblem`.
        target: T, (p, blocks * n).
        blocks: their number.

    Returns:
        S (I kron B) as (p, blocks * blocks * rank) or, for a diagonal, (p, blocks * rank); and the right side and X,
        each (systems, unknowns, n).
    """
    rows, rank = b.shape
    diagonal = output.ndim == 2
    systems, unknowns = (blocks, rank) if diagonal else (1, blocks * rank)
    spread = (output[:, :, None] * b[:, None] if diagonal else output.reshape(-1, rows) @ b).reshape(rows, -1)
    system = (b.T @ spread).reshape(rank, blocks, -1).transpose(0, 1).reshape(systems, unknowns, unknowns)
    pivots = system.diagonal(dim1=1, dim2=2)
    pivots += RIDGES[b.dtype] * pivots.mean()
    wanted = (b.T @ target).reshape(rank, blocks, -1).transpose(0, 1).reshape(systems, unknowns, -1)
    lower, failed = torch.linalg.cholesky_ex(system)
    if bool(failed.any()):
        system = (system + system.mT) / 2
        return spread, wanted, torch.linalg.pinv(system, hermitian=True) @ wanted
    return spread, wanted, torch.cholesky_solve(wanted, lower)


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
    far = None if inputs is None else factor_and_inverse(inputs)[0]
    far = far if far is None or far.ndim == 1 else far.T
    inverse = torch.ones(rows, dtype=torch.float64, device=weight.device)
    whitened = padded
    if pairs is not None and not plain:
        (mixer, _), (factor, inverse) = pairs
        whitened = times_left(mixer, padded.reshape(blocks, -1)).reshape(blocks, rows, -1)
        whitened = torch.stack([times_left(factor, block) for block in whitened])
    if not plain:
        whitened = times_right(whitened.reshape(blocks * rows, -1), far)
    stacked = _beside(whitened, blocks)
    if stacked.shape[0] <= stacked.shape[1]:
        basis, values = principal(stacked.T, rank)
    else:
        vectors, values = principal(stacked, rank)
        basis = torch.linalg.qr(stacked @ vectors).Q
    weighted = times_left(output, padded)
    target = times_right(weighted, far)
    return BlockProblem(
        weight=padded,
        weighted=_beside(weighted, blocks),
        target=_beside(target, blocks),
        output=_by_rows(padded.new_ones(len(padded)) if output is None else output, blocks),
        blocks=blocks,
        size=float((padded * times_right(weighted, inputs)).sum()),
        exact=output is None,
        inverse=inverse,
        basis=basis,
        values=values,
        energy=float(stacked.square().sum()),
    )


def _beside(matrix: Tensor, blocks: int) -> Tensor:
    """The blocks of rows of a matrix side by side: (p, blocks * n)."""
    return matrix.reshape(blocks, -1, matrix.shape[-1]).transpose(0, 1).flatten(1)


def _by_rows(moment: Tensor, blocks: int) -> Tensor:
    """S as in `BlockProblem.output`."""
    if moment.ndim == 1:
        return moment.reshape(blocks, -1).T.contiguous()
    rows = len(moment) // blocks
    return moment.reshape(blocks, rows, blocks, rows).permute(1, 0, 2, 3).contiguous()


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

    def problem(self, weight: Tensor, metric: Metric, *, plain: bool = False) -> BlockProblem:
        """The problem; `plain` as for `block_problem`."""
        if self.transposed:
            weight, metric = weight.T, Metric(metric.output, metric.input)
        return block_problem(weight, metric, self.blocks, self.rank, plain=plain)

    def shared_problem(self, weight: Tensor, metric: Metric) -> BlockProblem:
        """The problem, or the one that was set up last if it is the same: decompositions of one form share it."""
        form, known = _latest.get(metric, (None, None))
        if known is not None and form == (self.blocks, self.transposed) and known.basis.shape[1] >= self.rank:
            side = working(weight.T if self.transposed else weight)
            if side.device == known.weight.device and torch.equal(known.weight[: len(side)], side):
                return known
        problem = self.problem(weight, metric)
        _latest.clear()
        if weight.numel() < LARGE:
            _latest[metric] = (self.blocks, self.transposed), problem
        return problem

    def fit(self, weight: Tensor, metric: Metric, steps: int) -> list[Tensor]:
        """Cores of the fit, as those of `fit_train`."""
        problem = self.problem(weight, metric)
        if weight.numel() < SINGLE_FROM:  # from the plain fit, if its error is smaller: so as to be never worse
            problem = min(problem, self.problem(weight, metric, plain=True), key=lambda each: each.error(self.rank, 0))
        b, x, _ = problem.fit(self.rank, steps)
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
        problem = self.shared_problem(weight, metric)
        return [problem.error(rank, steps) for rank in ranks]


_latest: WeakKeyDictionary[Metric, tuple[tuple[int, bool], BlockProblem]] = WeakKeyDictionary()  # at most one
