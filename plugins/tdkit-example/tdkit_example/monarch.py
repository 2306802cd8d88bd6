"""W cut into blocks of strided rows and contiguous columns, each of low rank: a Monarch matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from tdkit import Decomposition, FactorizedMatrix, Metric
from tdkit.decompositions.base import assign, factor, positive
from tdkit.errors import OptionError
from tdkit.fitting.linalg import working
from tdkit.shapes import Shape
from torch import Tensor


class MonarchMatrix(FactorizedMatrix):
    """left (p, q * rank, out / p) and right (q, in / q, p * rank): two batched products."""

    def __init__(
        self,
        decomposition: Monarch,
        shape: Shape,
        rank: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(decomposition, shape)
        self.p, self.q = decomposition.grid(shape)
        self.left = factor(self.p, self.q * rank, shape[0] // self.p, device=device, dtype=dtype)
        self.right = factor(self.q, shape[1] // self.q, self.p * rank, device=device, dtype=dtype)

    def dense(self) -> Tensor:
        return self.matmul(torch.eye(self.shape[1], dtype=self.right.dtype, device=self.right.device)).T

    def matmul(self, x: Tensor) -> Tensor:
        rank = self.right.shape[2] // self.p
        inner = x.reshape(-1, self.q, self.right.shape[1]).transpose(0, 1) @ self.right  # (q, tokens, p * rank)
        turned = inner.reshape(self.q, -1, self.p, rank).permute(2, 1, 0, 3)
        out = turned.reshape(self.p, -1, self.q * rank) @ self.left  # (p, tokens, out / p)
        return out.permute(1, 2, 0).reshape(*x.shape[:-1], self.shape[0])

    def multiply_adds(self) -> int:
        return self.params


@dataclass(frozen=True, kw_only=True)
class Monarch(Decomposition):
    """The nearest Monarch matrix in the Frobenius norm: a truncated SVD of every block.

    With blocks of rank one and about sqrt(n) of them on each side it is the Monarch matrix of the paper;
    with one block it is plain low rank.

    Args:
        rank: of every block; left open, the budget chooses it.
        blocks: on each side; cut to the greatest common divisor with the dimension.

    Source: Dao et al., Monarch: expressive structured matrices (2022), section 3 and theorem 1.
    """

    name: ClassVar[str] = "monarch"
    rank: int | None = None
    blocks: int = 4

    def __post_init__(self) -> None:
        positive(self.name, "rank", self.rank)
        if self.blocks is None:
            raise OptionError("monarch: blocks must be an integer of at least 1")
        positive(self.name, "blocks", self.blocks)

    def grid(self, shape: Shape) -> Shape:
        """How many blocks stand in a column and in a row of the matrix: p divides out, q divides in."""
        return math.gcd(shape[0], self.blocks), math.gcd(shape[1], self.blocks)

    def candidates(self, shape: Shape) -> list[Self]:
        p, q = self.grid(shape)
        full = min(shape[0] // p, shape[1] // q)
        if self.rank is None:
            return [type(self)(rank=rank, blocks=self.blocks) for rank in range(1, full + 1)]
        if self.rank > full:
            raise OptionError(
                f"monarch: rank={self.rank} is above the full rank {full} of the {p}x{q} blocks of a "
                f"{shape[0]}x{shape[1]} matrix"
            )
        return [self]

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MonarchMatrix:
        self.check(shape)
        if self.rank is None:
            raise OptionError("monarch: give a rank, or a budget that chooses it")
        return MonarchMatrix(self, shape, self.rank, device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> MonarchMatrix:
        shape = (weight.shape[0], weight.shape[1])
        matrix = self.empty(shape, device=weight.device, dtype=weight.dtype)
        p, q = self.grid(shape)
        blocks = working(weight).reshape(shape[0] // p, p, q, shape[1] // q).permute(1, 2, 0, 3)
        u, s, vh = torch.linalg.svd(blocks, full_matrices=False)  # (p, q, out / p, k), (p, q, k), (p, q, k, in / q)
        root = s[..., : self.rank].sqrt().unsqueeze(-1)
        assign(matrix.left, (root * u.mT[:, :, : self.rank]).flatten(1, 2))
        assign(matrix.right, (root * vh[:, :, : self.rank]).permute(1, 3, 0, 2).flatten(2))
        return matrix
