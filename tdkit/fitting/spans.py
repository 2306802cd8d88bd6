"""Structured matrices Z (n, q) whose columns span the rows of a factorised tensor: products, and their gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.fitting.metric import times_left, times_right

Parts = list[Tensor]


class Span(ABC):
    """The structure of Z (n, q), a linear or multilinear function of parameter tensors, its parts."""

    @abstractmethod
    def dense(self, parts: Sequence[Tensor]) -> Tensor:
        """Z, (n, q)."""

    @abstractmethod
    def times(
        self,
        matrix: Tensor,  # (m, n)
        parts: Sequence[Tensor],
    ) -> Tensor:  # (m, q)
        """``matrix @ Z``."""

    @abstractmethod
    def pullback(
        self,
        matrix: Tensor,  # (m, n)
        slope: Tensor,  # (m, q)
        parts: Sequence[Tensor],
    ) -> Parts:
        """The gradients of ``(times(matrix) * slope).sum()`` with respect to the parts."""

    @abstractmethod
    def curvatures(
        self,
        squares: Tensor,  # (q,)
        parts: Sequence[Tensor],
    ) -> Parts:
        """The curvature of ``|X Z^T|^2`` by each entry of each part, for the squared norms of the columns of X."""

    @abstractmethod
    def unwhitened(self, parts: Sequence[Tensor], x: Tensor, inverses: Sequence[Tensor]) -> tuple[Parts, Tensor]:
        """Parts and X whose product is ``X Z^T`` with mode k of the columns multiplied by ``inverses[k]``."""


@dataclass(frozen=True)
class RepeatedSpan(Span):
    """Z = B kron I_t for one part B (m, r): the same row space for each of t positions.

    Attributes:
        repeats: t.
    """

    repeats: int

    def dense(self, parts: Sequence[Tensor]) -> Tensor:
        (b,) = parts
        identity = torch.eye(self.repeats, dtype=b.dtype, device=b.device)
        return (b[:, None, :, None] * identity[:, None]).reshape(len(b) * self.repeats, -1)

    def times(self, matrix: Tensor, parts: Sequence[Tensor]) -> Tensor:
        (b,) = parts
        blocks = matrix.reshape(len(matrix), len(b), self.repeats)
        return torch.einsum("nmt,mr->nrt", blocks, b).reshape(len(matrix), -1)

    def pullback(self, matrix: Tensor, slope: Tensor, parts: Sequence[Tensor]) -> Parts:
        (b,) = parts
        left = matrix.reshape(len(matrix), len(b), self.repeats)
        return [torch.einsum("nmt,nrt->mr", left, slope.reshape(len(matrix), -1, self.repeats))]

    def curvatures(self, squares: Tensor, parts: Sequence[Tensor]) -> Parts:
        return [squares.reshape(-1, self.repeats).sum(1).expand_as(parts[0])]

    def unwhitened(self, parts: Sequence[Tensor], x: Tensor, inverses: Sequence[Tensor]) -> tuple[Parts, Tensor]:
        first, last = inverses
        blocks = x.reshape(-1, self.repeats)
        return [times_left(first, parts[0])], times_right(blocks, last.T if last.ndim == 2 else last).reshape(x.shape)


@dataclass(frozen=True)
class KhatriRaoSpan(Span):
    """Z[(i_1, ..., i_d), r] = B_1[i_1, r] ... B_d[i_d, r] for parts B_k (m_k, r)."""

    def dense(self, parts: Sequence[Tensor]) -> Tensor:
        z = parts[0]
        for part in parts[1:]:
            z = (z[:, None] * part).flatten(0, 1)
        return z

    def times(self, matrix: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return matrix @ self.dense(parts)

    def pullback(self, matrix: Tensor, slope: Tensor, parts: Sequence[Tensor]) -> Parts:
        rest = matrix.T @ slope  # the gradient of Z, contracted with one part after the other from the last
        before = [parts[0]]
        for part in parts[1:-1]:
            before.append((before[-1][:, None] * part).flatten(0, 1))
        found = []
        for part, prefix in zip(reversed(parts[1:]), reversed(before), strict=True):
            blocks = rest.reshape(len(prefix), len(part), -1)
            found.append((blocks * prefix[:, None]).sum(0))
            rest = (blocks * part).sum(1)
        return [rest, *reversed(found)]

    def curvatures(self, squares: Tensor, parts: Sequence[Tensor]) -> Parts:
        norms = [part.square().sum(0) for part in parts]
        others = [math.prod(norms[:k] + norms[k + 1 :], start=squares) for k in range(len(parts))]
        return [other.expand_as(part) for other, part in zip(others, parts, strict=True)]

    def unwhitened(self, parts: Sequence[Tensor], x: Tensor, inverses: Sequence[Tensor]) -> tuple[Parts, Tensor]:
        return [times_left(inverse, part) for inverse, part in zip(inverses, parts, strict=True)], x
