"""Local search for row and column permutations under which a matrix is nearest to a sum of Kronecker products.

The *energy* of an ordering is the squared Frobenius norm of its fit; the fit's squared error is that of the matrix less
the energy, so the search maximises the energy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdkit.fitting.linalg import nearest_kronecker, rearrange, restore
from tdkit.fitting.permutations.assignment import best_assignment
from tdkit.fitting.permutations.spectral import DETECTED, embed, regrouped, spectral_starts
from tdkit.shapes import Shape

# Tuned by hand; `python -m tests.benchmarks.permutations --again` measures recovery, errors and seconds. A round is one
# update of the row order and one of the column order.
MAX_ROUNDS = 15  # of one call of `Climb.improved`
ROUNDS = 60  # of all calls together per unit of effort; fewer for larger matrices
LEAST_ROUNDS = 8  # of all calls together, for any size
FULL_BUDGET_SIDE = 512  # largest side of a square matrix that gets all of `ROUNDS`
DOUBTFUL_SIDE = 128  # largest side for which noise can hide a structure from `Climb.is_explained`
NEGLIGIBLE = 1e-12  # relative squared error of a fit that counts as exact
TOLERANCE = 3e-5  # least gain of a round, as a share of the matrix's squared norm, for the alternation to continue
STRIDE = 0.01  # gain, as such a share, from which a round of `Climb.refined` is not counted
FEW_TERMS = 16  # with more terms planted orders are not found either: no spectral start, one run of each alternation
QUICK_SIDE = 192  # short side of the rearranged matrix from which fits use power iterations instead of eigenvectors
POWER_ITERATIONS = 3
STAGES = 4  # pairs of spectral starts per unit of effort


@dataclass(frozen=True)
class Ordering:
    """A permutation of rows and columns, and the fit ``matrix[rows][:, columns] ~ sum_r a[r] kron b[r]``."""

    rows: Tensor  # (out,) int64
    columns: Tensor  # (in,) int64
    a: Tensor  # (terms, a1, a2)
    b: Tensor  # (terms, b1, b2)
    energy: float  # squared Frobenius norm of the sum


def search(
    matrix: Tensor,  # (out, in) float64
    a: Shape,
    b: Shape,
    terms: int,
    *,
    rows: bool = True,
    columns: bool = True,
    seed: int = 0,
    effort: int = 1,
) -> Ordering:
    """Fit a sum of Kronecker products to a matrix whose rows and columns may be permuted.

    Several starting orders are improved by alternation, and the best result is returned. The starts are the given
    order, the order by norm and, if the matrix shows a permuted structure, the spectral ones. One round of alternation
    refits the factors for the current order, then reorders the rows (and the columns) for these factors, which is a
    linear assignment; neither step lowers the energy. When that converges, the rows are assigned by their gain after a
    refit of the factors, and an assignment is kept if it raises the energy. The result is never worse than
    `nearest_kronecker` for the given order, and deterministic for a seed.

    Args:
        matrix: what to fit; (a[0] * b[0], a[1] * b[1]).
        a, b, terms: shapes of the factors and their number, as for `nearest_kronecker`.
        rows, columns: whether they may be reordered.
        seed: of the random rotations in the spectral starts. The search is repeated with the next seed for a matrix of
            at most `DOUBTFUL_SIDE` rows and columns, and for one of at most `FULL_BUDGET_SIDE` if no structure was
            recovered.
        effort: multiplies the number of spectral starts and of rounds; 0 omits the spectral starts.

    Source: the permuted form is that of Abronin et al., TQCompressor (2024), section 3. The alternation of fits and
    assignments, the spectral starts (`tdkit.fitting.permutations.spectral`) and the gain after a refit are new here.
    """
    size = float(matrix.abs().max())
    if size == 0 or not (rows or columns):
        return _exact_fit(matrix, a, b, terms, *_as_it_stands(matrix))
    scale = 2.0 ** math.floor(math.log2(size))  # a power of two: scaling by it is exact
    climb = Climb(matrix / scale, a, b, terms, rows, columns, effort)
    found = _search(climb, seed)
    side = max(matrix.shape)
    doubtful = side <= DOUBTFUL_SIDE or (side <= FULL_BUDGET_SIDE and not climb.is_recovered(found))
    if effort and terms <= FEW_TERMS and doubtful and found.energy < (1 - NEGLIGIBLE) * climb.total:
        again = _search(Climb(matrix / scale, a, b, terms, rows, columns, effort), seed + 1)
        found = max(found, again, key=_energy)
    return replace(found, b=found.b * scale, energy=found.energy * scale * scale)


def _search(climb: Climb, seed: int) -> Ordering:
    plain = best = _exact_fit(climb.matrix, climb.a, climb.b, climb.terms, *_as_it_stands(climb.matrix))
    if plain.energy >= (1 - NEGLIGIBLE) * climb.total:
        return plain
    if climb.terms > FEW_TERMS:
        best = climb.improved(max(plain, climb.by_norm(), key=_energy))
        climb.rounds += climb.reserve
        return max(plain, climb.refined(best), key=_energy)
    found: list[Ordering] = []
    for start in climb.spectral(plain, seed):
        found.append(climb.finished(climb.improved(start)))
        if climb.is_explained(found[-1]) or climb.rounds <= 0:
            break
    if climb.rounds > 0 and not any(climb.is_recovered(ordering) for ordering in found):
        found += [climb.improved(start) for start in (plain, climb.by_norm())]
    climb.rounds += climb.reserve
    for ordering in sorted(found, key=_energy, reverse=True):
        best = max(best, climb.polished(ordering), key=_energy)
        if climb.is_recovered(best) or climb.rounds <= 0:
            break
    if best.a.dtype != torch.float64:
        best = _exact_fit(climb.matrix, climb.a, climb.b, climb.terms, best.rows, best.columns)
    return max(plain, best, key=_energy)


class Climb:
    """Local search on one matrix, with a shared budget of rounds; in float32 where only the orders matter."""

    def __init__(self, matrix: Tensor, a: Shape, b: Shape, terms: int, rows: bool, columns: bool, effort: int) -> None:
        self.matrix = matrix
        self.single = matrix.float()
        self.total = float(matrix.square().sum())
        self.a, self.b, self.terms = a, b, terms
        self.move_rows, self.move_columns = rows, columns
        small = min(1.0, 2 * FULL_BUDGET_SIDE**2 / (matrix.shape[0] ** 2 + matrix.shape[1] ** 2))
        rounds = max(1, effort) * (1 if terms > FEW_TERMS else max(LEAST_ROUNDS, round(ROUNDS * small)))
        self.stages = STAGES * effort
        self.reserve = rounds // 3  # for `polished`
        self.rounds = max(rounds - self.reserve, min(rounds, LEAST_ROUNDS))

    def spectral(self, plain: Ordering, seed: int) -> Iterator[Ordering]:
        """Fitted spectral starts, stage by stage; within a stage in descending order of energy."""
        if self.stages == 0:
            return
        starts = spectral_starts(self.single, self.a, self.b, rows=self.move_rows, columns=self.move_columns, seed=seed)
        for _, stage in zip(range(self.stages), starts, strict=False):
            fitted = [self.fit(rows, columns) for rows, columns in stage]
            yield from sorted(fitted, key=lambda o: -o.energy)

    def by_norm(self) -> Ordering:
        """The fit with rows and columns in descending order of their norms."""
        rows, columns = (self.matrix.norm(dim=d).cpu().argsort(descending=True, stable=True) for d in (1, 0))
        return self.fit(
            rows if self.move_rows else torch.arange(len(rows)),
            columns if self.move_columns else torch.arange(len(columns)),
        )

    def improved(self, start: Ordering) -> Ordering:
        """Alternate refits and assignments for fixed factors from `start`, until a round gains too little."""
        best = start
        for _ in range(min(MAX_ROUNDS, max(1, self.rounds))):
            self.rounds -= 1
            now = best
            if self.move_rows:
                rows = _better_rows(self.single[:, now.columns], now.a, now.b, now.rows)
                now = self.refit(now, rows, now.columns)
            if self.move_columns:
                columns = _better_rows(self.single[now.rows].T, now.a.mT, now.b.mT, now.columns)
                now = self.refit(now, now.rows, columns)
            if not self.gains(now, best):
                return max(best, now, key=_energy)
            best = now
        return best

    def refined(self, start: Ordering) -> Ordering:
        """Assign by the gain after a refit (`_refit_gain`) from `start`, until a round gains too little."""
        best = start
        while self.rounds > 0 and best.energy < (1 - NEGLIGIBLE) * self.total:
            self.rounds -= 1
            now = best
            if self.move_rows:
                gain = _refit_gain(self.single[:, now.columns], now.a.float(), now.b.float(), now.rows)
                now = max(now, self.refit(now, best_assignment(gain), now.columns), key=_energy)
            if self.move_columns:
                gain = _refit_gain(self.single[now.rows].T, now.a.mT.float(), now.b.mT.float(), now.columns)
                now = max(now, self.refit(now, now.rows, best_assignment(gain)), key=_energy)
            if not self.gains(now, best):
                now = self.turned(now)
            if not self.gains(now, best):
                return now
            if self.gains(now, best, STRIDE):
                self.rounds += 1
            best = now
        return best

    def turned(self, ordering: Ordering) -> Ordering:
        """`ordering` with the sign flips of groups of rows and of columns (see `_turned`) that raise the energy."""
        best = ordering
        for axis in (0, 1):
            if self.move_rows:
                rows = _turned(self.single[:, best.columns], best.a, best.b, best.rows, axis)
                best = max(best, self.refit(best, rows, best.columns), key=_energy)
            if self.move_columns:
                columns = _turned(self.single[best.rows].T, best.a.mT, best.b.mT, best.columns, axis)
                best = max(best, self.refit(best, best.rows, columns), key=_energy)
        return best

    def polished(self, ordering: Ordering) -> Ordering:
        """Repeat `finished` and `refined` until the energy no longer rises."""
        best = self.refined(ordering)
        while self.gains(now := self.refined(self.finished(best)), best):
            best = now
        return best

    def finished(self, ordering: Ordering) -> Ordering:
        """Recompute each order from the other one, and alternate, until the energy no longer rises.

        Assignments mostly move single rows. Computing the whole order anew (`regrouped`) can move whole groups.
        """
        while self.rounds > 0 and not self.is_explained(ordering):
            now = ordering
            if self.move_rows:
                rows = regrouped(self.single[:, now.columns], self.a, self.b, self.terms)
                now = self.refit(now, rows, now.columns)
            if self.move_columns:
                a, b = self.a[::-1], self.b[::-1]
                now = self.refit(now, now.rows, regrouped(self.single[now.rows].T, a, b, self.terms))
            now = self.improved(now)
            if not self.gains(now, ordering):
                return ordering
            ordering = now
        return ordering

    def gains(self, now: Ordering, before: Ordering, share: float = TOLERANCE) -> bool:
        """Whether the energy of `now` exceeds that of `before` by more than `share` of the matrix's squared norm."""
        return now.energy > before.energy + share * self.total

    def is_explained(self, ordering: Ordering) -> bool:
        """Whether the residual of the fit shows no permuted structure."""
        if ordering.energy >= (1 - NEGLIGIBLE) * self.total:
            return True
        left = self.single[ordering.rows][:, ordering.columns] - _dense(ordering.a, ordering.b).float()
        return float(left.square().sum()) <= NEGLIGIBLE * self.total or embed(left, count=4).excess < DETECTED

    def is_recovered(self, ordering: Ordering) -> bool:
        """Whether the fit holds half of the squared norm and is explained; other starts are then skipped."""
        return ordering.energy >= self.total / 2 and self.is_explained(ordering)

    def refit(self, ordering: Ordering, rows: Tensor, columns: Tensor) -> Ordering:
        """The fit for other orders; `ordering` itself if they are its own."""
        if torch.equal(rows, ordering.rows) and torch.equal(columns, ordering.columns):
            return ordering
        return self.fit(rows, columns, ordering.b)

    def fit(self, rows: Tensor, columns: Tensor, warm: Tensor | None = None) -> Ordering:
        """The fit for an order: exact, or for few terms of a large matrix by power iterations from `warm`."""
        terms = self.terms
        if terms > FEW_TERMS or min(math.prod(self.a), math.prod(self.b)) < QUICK_SIDE:
            return _exact_fit(self.matrix, self.a, self.b, terms, rows, columns)
        flat = rearrange(self.single[rows][:, columns], self.a, self.b)
        generator = torch.Generator().manual_seed(0)
        guess = torch.randn(flat.shape[1], terms + 4, generator=generator).to(flat.device)
        if warm is not None:
            guess = torch.cat([warm.flatten(1).T.float(), guess], dim=1)
        for _ in range(POWER_ITERATIONS):
            guess = torch.linalg.qr(flat.T @ (flat @ guess))[0]
        u, singular, v = torch.linalg.svd(flat @ guess, full_matrices=False)
        left, right = (u * singular)[:, :terms], (guess @ v.T)[:, :terms]
        return _ordering(rows, columns, left.T.reshape(terms, *self.a), right.T.reshape(terms, *self.b))


def _better_rows(matrix: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
    """An order of the rows of `matrix` for fixed factors and columns, no worse than `rows`."""
    gain = _row_gain(matrix, a.to(matrix), b.to(matrix)).cpu()
    order = best_assignment(gain)
    places = torch.arange(len(rows))
    return order if gain[places, order].sum() > gain[places, rows].sum() else rows


def _turned(matrix: Tensor, a: Tensor, b: Tensor, order: Tensor, axis: int) -> Tensor:
    """`order` with some groups permuted within themselves; a group is the rows of one i1 (axis 0) or i2 (axis 1).

    If B has rows that are nearly the negatives of each other, a group of one i1 fits nearly as well with these rows
    exchanged and its row of A negated. The one is a local optimum when seen from the other, as long as rows move one at
    a time. A group takes its best order for the negated row of A if that has the larger gain.
    """
    gain, order = _row_gain(matrix, a.to(matrix), b.to(matrix)).cpu(), order.clone()
    places = torch.arange(len(order)).reshape(a.shape[1], b.shape[1])
    for group in places if axis == 0 else places.T:
        here = gain[group][:, order[group]]
        turned = best_assignment(-here)
        if -here[torch.arange(len(group)), turned].sum() > here.diagonal().sum():
            order[group] = order[group][turned]
    return order


def _row_gain(matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(places, rows): the inner product of each row of the sum of Kronecker products with each row of `matrix`."""
    terms, a1, a2 = a.shape
    _, b1, b2 = b.shape
    if terms * a2 * b1 * (b2 + a1) >= a1 * b1 * a2 * b2:
        return _dense(a, b) @ matrix.T
    blocks = matrix.reshape(-1, b2)
    gain = torch.zeros(a1, len(matrix) * b1, dtype=matrix.dtype, device=matrix.device)
    for upper, lower in zip(a, b, strict=True):
        inner = (blocks @ lower.T).reshape(len(matrix), a2, b1)
        gain += upper @ inner.transpose(0, 1).reshape(a2, -1)
    return gain.reshape(a1, len(matrix), b1).transpose(1, 2).reshape(a1 * b1, len(matrix))


def _refit_gain(matrix: Tensor, a: Tensor, b: Tensor, order: Tensor) -> Tensor:
    """(places, rows): the energy with a row in a place and the factors refitted, up to a constant per place.

    For orthonormal B_r the best A is a sum over the rows, ``A[i1] = sum_i2 z(row in (i1, i2))``, and its squared norm
    is the energy. Replacing one row makes that ``|A[i1] - z_old + z_new|^2``. Its first-order part,
    ``2 <A[i1], z_new - z_old>``, is the gain for fixed factors and favours the old row, which contributed to A. The
    same holds with A and B exchanged. Both second-order parts are added here; their overlap is neglected.
    """
    count = len(matrix)
    blocks = matrix.contiguous().reshape(count, a.shape[2], b.shape[2])
    places = order.reshape(a.shape[1], b.shape[1])
    (upper, _), (lower, mixing) = _orthonormal(a), _orthonormal(b)
    fitted = torch.einsum("rs,sij->irj", mixing, a).flatten(1)
    gain = torch.empty(*places.shape, count, dtype=matrix.dtype, device=matrix.device)
    for i2, rows in enumerate(places.T):
        z = (lower[:, i2] @ blocks.mT).flatten(1)
        gain[:, i2] = 2 * (fitted - z[rows]) @ z.T + z.square().sum(dim=1)
    for i1, rows in enumerate(places):
        z = (upper[:, i1] @ blocks).flatten(1)
        gain[i1] += z.square().sum(dim=1) - 2 * z[rows] @ z.T
    return gain.flatten(0, 1)


def _orthonormal(factors: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (r, m, n) of the factors (s, m, n), and their coordinates (r, s) in it."""
    basis, triangle = torch.linalg.qr(factors.flatten(1).T)
    return basis.T.reshape(-1, *factors.shape[1:]), triangle


def _dense(a: Tensor, b: Tensor) -> Tensor:
    return restore(a.flatten(1).T @ b.flatten(1), (a.shape[1], a.shape[2]), (b.shape[1], b.shape[2]))


def _exact_fit(matrix: Tensor, a: Shape, b: Shape, terms: int, rows: Tensor, columns: Tensor) -> Ordering:
    return _ordering(rows, columns, *nearest_kronecker(matrix[rows][:, columns], a, b, terms))


def _ordering(rows: Tensor, columns: Tensor, a: Tensor, b: Tensor) -> Ordering:
    grams = [f.flatten(1).double() @ f.flatten(1).double().T for f in (a, b)]
    return Ordering(rows, columns, a, b, float((grams[0] * grams[1]).sum()))


def _energy(ordering: Ordering) -> float:
    return ordering.energy


def _as_it_stands(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(matrix.shape[0]), torch.arange(matrix.shape[1])
