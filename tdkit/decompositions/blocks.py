"""A matrix cut into blocks of rows, such as query, key and value, or attention heads, each with factors of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from tdkit.decompositions.auto import Auto
from tdkit.decompositions.base import Decomposition, FactorizedMatrix
from tdkit.decompositions.options import positive
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import OptionError, RegistryError
from tdkit.fitting.metric import Metric
from tdkit.products.cost import Path
from tdkit.shapes import Shape, by


class BlocksMatrix(FactorizedMatrix):
    """Blocks of rows (out / parts, in), each a factorised matrix."""

    def __init__(
        self, decomposition: Blocks, shape: Shape, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__(decomposition, shape)
        block = decomposition.block_shape(shape)
        each = (decomposition.member.empty(block, device=device, dtype=dtype) for _ in range(decomposition.parts))
        self.members = nn.ModuleList(each)
        self._multiply_adds: int = sum(member.multiply_adds() for member in self)

    def __iter__(self) -> Any:
        return (cast(FactorizedMatrix, member) for member in self.members)

    def dense(self) -> Tensor:
        return torch.cat([member.dense() for member in self])

    def matmul(self, x: Tensor) -> Tensor:
        return torch.cat([member(x) for member in self], -1)

    def multiply(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor:
        y = self.matmul(x)
        return y if bias is None else y + bias

    def multiply_adds(self) -> int:
        return self._multiply_adds


@dataclass(frozen=True, kw_only=True)
class Blocks(Decomposition):
    """A matrix (out, in) cut into `parts` blocks of out / parts rows, each written as factors by one decomposition.

    For packed projections: with ``parts=3`` the query, key and value of ``nn.MultiheadAttention``'s ``in_proj_weight``
    have factors of their own, with ``parts=3 * num_heads`` each head has.

    Args:
        each: the decomposition of a block, its name, or ``{name: {option: value}}``.
        parts: number of blocks; it must divide the rows.
    """

    name: ClassVar[str] = "blocks"
    each: Decomposition | str | Mapping[str, Any] = "low_rank"
    parts: int = 3

    def __post_init__(self) -> None:
        positive(self.name, "parts", self.parts)
        try:
            kind = decomposition(self.each)
        except (OptionError, RegistryError) as error:
            raise OptionError(f"blocks: each={self.each!r}: {error}") from None
        if isinstance(kind, Blocks | Auto) or 2 not in kind.orders:
            raise OptionError(f"blocks: each={kind.describe()} must be a decomposition of matrices other than auto")
        object.__setattr__(self, "each", kind)

    @property
    def member(self) -> Decomposition:
        """The decomposition of a block."""
        return decomposition(self.each)

    def block_shape(self, shape: Shape) -> Shape:
        """Returns the shape of a block of a matrix of `shape`.

        Raises:
            OptionError: when the rows cannot be cut into `parts` equal blocks.
        """
        if shape[0] % self.parts:
            raise OptionError(f"blocks: parts={self.parts} does not divide the {shape[0]} rows of a {by(shape)} matrix")
        return shape[0] // self.parts, shape[1]

    def is_complete(self) -> bool:
        return self.member.is_complete()

    def candidates(self, shape: Shape) -> list[Self]:
        return [replace(self, each=choice) for choice in self.member.candidates(self.block_shape(shape))]

    def num_params(self, shape: Shape) -> int:
        return self.parts * self.member.num_params(self.block_shape(shape))

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        each = self.member.complete(self.block_shape(shape), max_params // self.parts)
        return None if each is None else replace(self, each=each)

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BlocksMatrix:
        return BlocksMatrix(self, shape, device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> BlocksMatrix:
        matrix = self.empty(tuple(weight.shape), device=weight.device, dtype=weight.dtype)
        size = weight.shape[0] // self.parts
        for number, block in enumerate(torch.split(weight, size)):
            rows = slice(number * size, (number + 1) * size)
            matrix.members[number] = self.member.fit(block, None if metric is None else _rows_of(metric, rows))
        return matrix

    def options(self) -> dict[str, Any]:
        each = spec_of(self.member)
        changed: dict[str, Any] = {} if each == {"low_rank": {}} else {"each": each}
        return changed | ({} if self.parts == 3 else {"parts": self.parts})

    def describe(self) -> str:
        return f"blocks({self.parts} of {self.member.describe()})"


def _rows_of(metric: Metric, rows: slice) -> Metric:
    """Returns the metric of some rows of a weight, without what the gradients of other rows have to do with theirs."""
    output = metric.output
    if output is not None:
        output = output[rows] if output.ndim == 1 else output[rows, rows]
    return Metric(metric.input, output)
