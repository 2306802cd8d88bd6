"""Factorised stacks of matrices: the weights of the experts of a layer, each of which multiplies alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.decompositions.base import Decomposition, FactorizedMatrix, Preference, factor
from tdkit.products.autograd import autocast_dtype
from tdkit.products.convolution import Geometry
from tdkit.products.cost import CACHED, Path, PathTable, cached_path, lookup, path_table
from tdkit.products.dispatch import check_loaded
from tdkit.products.grouped import grouped_product
from tdkit.products.low_rank import LowRankStructure
from tdkit.shapes import Shape
from tdkit.support.compatibility import parameters_of, submodules_of


class FactorizedStack(FactorizedMatrix):
    """A stack of matrices (members, out, in) held as factors.

    As a `FactorizedMatrix` it is the matrix (members, out * in) of its flattened members.

    Args:
        decomposition: the complete decomposition that makes it.
        shape: (members, out, in).
    """

    def __init__(self, decomposition: Decomposition, shape: Shape) -> None:
        super().__init__(decomposition, shape)
        self._dense = self.dispatcher.new_cache()

    def parts(self) -> tuple[FactorizedMatrix, ...]:
        """The members that are matrices of their own, for which the stack caches."""
        return ()

    @abstractmethod
    def stack(self) -> Tensor:
        """The matrices themselves, (members, out, in)."""

    @abstractmethod
    def grouped(
        self,
        x: Tensor,  # (rows, in), the rows of the first member first
        counts: Sequence[int],  # rows of each member
        bias: Tensor | None = None,  # (members, out)
    ) -> Tensor:  # (rows, out)
        """The product of each row with the matrix of its member; members without rows are not computed."""

    def cached_stack(self, x: Tensor, counts: Sequence[int]) -> Tensor | None:  # (members, out, in)
        """The dense stack from the cache, where `grouped` is faster by it; None where it is not, or may not be."""
        if not self.dispatcher.may_cache(self):
            return None
        reached = [count for count in counts if count]
        if not reached or not self._is_faster_cached(sum(reached) // len(reached), x.dtype, x.device.type):
            return None
        dtype = autocast_dtype(x.device.type) or x.dtype
        known = self._dense.of_some(self._reached_tensors(counts), dtype)
        if known is not None:
            return known
        tensors = self.tensors()
        if any(tensor.is_meta for tensor in tensors):  # hooks load them when the members are called
            return None
        return self._dense.get(tensors, dtype, self.stack)

    def _reached_tensors(
        self,
        counts: Sequence[int],
    ) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """The tensors of the members with rows, each with the place of the first of them in `tensors`."""
        yield 0, self.tensors()

    @abstractmethod
    def _is_faster_cached(self, rows: int, dtype: torch.dtype, device: str) -> bool:
        """Whether `rows` rows for each member are multiplied faster by a cached stack."""

    def products(
        self,
        x: Tensor,  # (tokens, in) or (members, tokens, in)
    ) -> Tensor:  # (members, tokens, out)
        """The products of every row with every member, or with the member that it belongs to."""
        return x @ self.stack().mT

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        geometry: Geometry | None = None,
        counts: Sequence[int] | None = None,
        *,
        every: bool = False,
    ) -> Tensor:
        """`grouped` with `counts`, `products` with `every`, else as `FactorizedMatrix.forward`.

        Called as a module so that hooks run.
        """
        if every:
            return self.products(x)
        return super().forward(x, bias, geometry) if counts is None else self.grouped(x, counts, bias)

    @abstractmethod
    def member_paths(self, rows: int) -> tuple[Path, ...]:
        """The paths to multiply `rows` rows by one member without a cached weight."""

    @abstractmethod
    def member_path(self, rows: int, *, prefer: Preference | None = None) -> Path:
        """The path of `grouped` in eval mode where each member has `rows` rows; `prefer` as it is set when None."""

    def dense(self) -> Tensor:
        return self.stack().flatten(1)


def dense_grouped(
    weight: Tensor,  # (members, out, in)
    x: Tensor,  # (rows, in), the rows of the first member first
    counts: Sequence[int],  # rows of each member
    bias: Tensor | None = None,  # (members, out)
) -> Tensor:  # (rows, out)
    """As `FactorizedStack.grouped`, for dense matrices; without gradients by one call of torch where it has one."""
    y = grouped_product(x, weight, counts)
    if y is not None:
        return y if bias is None else y + _of_rows(bias, counts)
    parts = [F.linear(rows, weight[e], None if bias is None else bias[e]) for e, rows in _reached(x, counts)]
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[1])


def _reached(x: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """The members with rows, each with its rows of x."""
    start = 0
    for member, count in enumerate(counts):
        if count:
            yield member, x[start : start + count]
            start += count


class MemberStack(FactorizedStack):
    """A stack whose members are factorised matrices of their own."""

    def __init__(
        self,
        decomposition: Decomposition,
        each: Decomposition,
        shape: Shape,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(decomposition, shape)
        self.members = nn.ModuleList(each.empty(shape[1:], device=device, dtype=dtype) for _ in range(shape[0]))

    def stack(self) -> Tensor:
        return torch.stack([member.dense() for member in self.parts()])

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts() for tensor in part.tensors())

    def grouped(self, x: Tensor, counts: Sequence[int], bias: Tensor | None = None) -> Tensor:
        weight = self.cached_stack(x, counts)
        if weight is not None:
            return dense_grouped(weight, x, counts, bias)
        members = list(submodules_of(self.members).values())
        parts = [members[e](rows, None if bias is None else bias[e]) for e, rows in _reached(x, counts)]
        return torch.cat(parts) if parts else x.new_zeros(0, self.sizes[1])

    def products(self, x: Tensor) -> Tensor:
        rows = x.unbind() if x.ndim == 3 else [x] * len(self.members)
        return torch.stack([member(own) for member, own in zip(self.members, rows, strict=True)])

    def multiply_adds(self) -> int:
        return self.parts()[0].multiply_adds()

    def member_paths(self, rows: int) -> tuple[Path, ...]:
        return self.parts()[0].paths(rows)

    def member_path(self, rows: int, *, prefer: Preference | None = None) -> Path:
        return self.parts()[0].path(rows, prefer=prefer or self.prefer)

    def parts(self) -> tuple[FactorizedMatrix, ...]:
        return tuple(cast("dict[str, FactorizedMatrix]", submodules_of(self.members)).values())

    def _reached_tensors(self, counts: Sequence[int]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        for number, (part, count) in enumerate(zip(self.parts(), counts, strict=True)):
            if count:
                tensors = part.tensors()
                yield number * len(tensors), tensors

    def _is_faster_cached(self, rows: int, dtype: torch.dtype, device: str) -> bool:
        first = self.parts()[0]
        return lookup(first.dispatcher.table(first, dtype, device, cached=True), rows).name == CACHED


class LowRankStack(FactorizedStack):
    """left (members, out, rank) times right (members, rank, in), one of which all members may share.

    Args:
        decomposition: the complete decomposition that makes it.
        shape: (members, out, in).
        rank: columns of each left factor.
        shared: "input" for one right factor (rank, in), "output" for one left factor (out, rank), or None.
    """

    def __init__(
        self,
        decomposition: Decomposition,
        shape: Shape,
        rank: int,
        shared: str | None,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(decomposition, shape)
        members, out, width = shape
        self.rank = rank
        self.member_structure = LowRankStructure((out, width), rank)
        own = {"device": device, "dtype": dtype}
        # in memory along the longer side, as in LowRankMatrix
        if shared == "output":
            self.left = factor(out, rank, axes=(1, 0), **own)  # type: ignore[arg-type]
        else:
            self.left = factor(members, out, rank, axes=(0, 2, 1), **own)  # type: ignore[arg-type]
        self.right = factor(*(() if shared == "input" else (members,)), rank, width, **own)  # type: ignore[arg-type]

    def factors(self) -> tuple[Tensor, Tensor]:
        parameters = parameters_of(self)
        try:
            return parameters["left"], parameters["right"]
        except KeyError:  # one has a parametrization
            return self.left, self.right

    def tensors(self) -> tuple[Tensor, ...]:
        return self.factors()

    def stack(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def products(self, x: Tensor) -> Tensor:
        left, right = self.factors()
        return (x @ right.mT) @ left.mT

    def multiply_adds(self) -> int:
        return self.member_structure.multiply_adds()

    def member_paths(self, rows: int) -> tuple[Path, ...]:
        return self.member_structure.factor_paths(rows)

    def member_path(self, rows: int, *, prefer: Preference | None = None) -> Path:
        device = "cpu" if self.left.is_meta else self.left.device.type
        if (prefer or self.prefer) == "speed" and self._is_faster_cached(rows, self.left.dtype, device):
            return cached_path(rows, self.member_structure.shape)
        return self.member_paths(rows)[0]

    def grouped(self, x: Tensor, counts: Sequence[int], bias: Tensor | None = None) -> Tensor:
        check_loaded(self.factors(), x)
        weight = self.cached_stack(x, counts)
        if weight is not None:
            return dense_grouped(weight, x, counts, bias)
        left, right = self.factors()
        if right.ndim == 2:
            return dense_grouped(left, F.linear(x, right), counts, bias)
        if left.ndim == 2:
            y = F.linear(dense_grouped(right, x, counts), left)
            return y if bias is None else y + _of_rows(bias, counts)
        parts = [
            F.linear(F.linear(rows, right[e]), left[e], None if bias is None else bias[e])
            for e, rows in _reached(x, counts)
        ]
        return torch.cat(parts) if parts else x.new_zeros(0, self.sizes[1])

    def _is_faster_cached(self, rows: int, dtype: torch.dtype, device: str) -> bool:
        table = _table(self.member_structure, dtype, device, torch.get_num_threads())
        return lookup(table, rows).name == CACHED


@cache
def _table(structure: LowRankStructure, dtype: torch.dtype, device: str, threads: int) -> PathTable:
    return path_table(structure.factor_paths, structure.shape, dtype=dtype, device=device, threads=threads, cached=True)


def _of_rows(
    values: Tensor,  # (members, n)
    counts: Sequence[int],  # rows of each member
) -> Tensor:  # (rows, n)
    """The value of each row's member."""
    return values.repeat_interleave(torch.tensor(counts, device=values.device), dim=0, output_size=sum(counts))
