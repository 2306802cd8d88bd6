"""Low-rank fits of a stack of matrices with one factor in common, such as the experts of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from tdkit.fitting.linalg import working
from tdkit.fitting.metric import factor_and_inverse, times_left, times_right


class SharedBasis:
    """The approximations ``left[e] @ right`` of the members W_e of a stack, for every rank.

    The common rows of `right` are the leading right singular vectors of the members above each other, whitened by
    the mean of the members' C_e: optimal if these are equal up to a factor, else an approximation. Given the rows,
    each `left[e]` minimises the error tr(S_e E C_e E^T) of its member.

    Args:
        weight: the stack (members, out, in), any float dtype.
        inner: C_e, positive definite, (members, in, in) float64; the identity when None.
        outer: S_e, (members, out, out) float64; the identity when None.

    Sources: Eckart and Young (1936), of the matrices above each other; the common basis is that of
    Wang et al., Basis Sharing (2024), section 3.
    """

    def __init__(self, weight: Tensor, inner: Tensor | None, outer: Tensor | None) -> None:
        self.weight = working(weight)
        self.inner = None if inner is None else inner.to(weight.device)
        self.outer = outer
        weighted = times_left(outer, self.weight)
        root, inverse = None, None
        if self.inner is not None:
            traces = self.inner.diagonal(dim1=-2, dim2=-1).sum(-1)
            weighted = weighted * (traces / traces.mean())[:, None, None]
            root, inverse = factor_and_inverse(self.inner.mean(0))
        gram = (self.weight.mT @ weighted).sum(0)
        whitened = gram if root is None else root @ gram @ root.T
        values, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
        self.squares = values.flip(0).clamp_min(0)
        self.rows = times_right(vectors.flip(1).T, None if inverse is None else inverse.T)  # (in, in), the first lead

    def fit(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns left (members, out, rank) and right (rank, in), float64; 1 <= rank <= min(members * out, in)."""
        tiny = torch.finfo(torch.float64).tiny
        level = self.squares[:rank].maximum(self.squares[0] * 1e-16 + tiny)[:, None] ** 0.25
        rows = self.rows[:rank]
        seen = times_right(rows, self.inner)  # R C_e
        left = self.weight @ seen.mT
        if self.inner is not None:
            left = torch.linalg.solve(seen @ rows.T, left, left=False)
        return left / level.T, rows * level

    def errors(self) -> Tensor:
        """Returns the sums of the members' errors for the ranks 1 to in, (in,) float64.

        With R C_e R^T = K K^T, each column of W_e C_e R^T K^-T is what the row of R adds to the ranks before it.
        """
        seen = times_right(self.rows, self.inner)
        gained = self.weight @ seen.mT
        if self.inner is not None:
            lower: Tensor = torch.linalg.cholesky(seen @ self.rows.T)
            gained = torch.linalg.solve_triangular(lower.mT, gained, upper=True, left=False)
        squares = (gained * times_left(self.outer, gained)).sum((0, 1)).clamp_min(0)
        tails = squares.flip(0).cumsum(0).flip(0)  # summed from the smallest up: the last keep their digits
        return torch.cat([tails[1:], tails.new_zeros(1)])
