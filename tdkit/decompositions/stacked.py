"""One decomposition for every matrix of a stack, such as the experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from tdkit.decompositions.auto import Auto
from tdkit.decompositions.base import Decomposition, Point, assign
from tdkit.decompositions.error_curve import exact_curve, lowest
from tdkit.decompositions.low_rank import LowRank
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.decompositions.stacks import FactorizedStack, LowRankStack, MemberStack
from tdkit.errors import OptionError, TdkitError
from tdkit.fitting.low_rank import squared_singular_values, truncated_in_metric
from tdkit.fitting.metric import Metric
from tdkit.fitting.shared_basis import SharedBasis
from tdkit.shapes import Shape, by

Side = Literal["input", "output"]

BATCH_BYTES = 2**30  # of the float64 matrices that one batched call takes: weight, moments and their roots


@dataclass(frozen=True, kw_only=True)
class Stacked(Decomposition):
    """Every matrix of a stack (members, out, in) written as factors by one decomposition of the same size.

    Low-rank members are fitted together, by batched calls. They may share one of their two factors: with E members,
    rank * (E * out + in) parameters instead of rank * E * (out + in).

    Args:
        each: the decomposition of a member, its name, or ``{name: {option: value}}``.
        shared: one factor for all members; for ``each=LowRank()`` only.
        side: the factor that is shared: "input" for the right one (rank, in), which the members' inputs are multiplied
            by, "output" for the left one (out, rank). Left open, the budget chooses it.

    Sources: as of `LowRank`; of shared factors, Wang et al., Basis Sharing (2024), section 3.
    """

    name: ClassVar[str] = "stacked"
    orders: ClassVar[frozenset[int]] = frozenset({3})
    stacks: ClassVar[bool] = True
    each: Decomposition | str | Mapping[str, Any] = "low_rank"
    shared: bool = False
    side: Side | None = None

    def __post_init__(self) -> None:
        try:
            kind = decomposition(self.each)
        except TdkitError as error:
            raise OptionError(f"stacked: each={self.each!r}: {error}") from None
        if kind.stacks or isinstance(kind, Auto):
            raise OptionError(f"stacked: each={kind.describe()} must be a decomposition of matrices other than auto")
        object.__setattr__(self, "each", kind)
        if not isinstance(self.shared, bool):
            raise OptionError(f"stacked: shared={self.shared!r} must be true or false")
        if self.shared and not isinstance(kind, LowRank):
            raise OptionError(f"stacked: shared=True needs each=low_rank, not {kind.describe()}")
        if self.side is not None and (not self.shared or self.side not in get_args(Side)):
            raise OptionError(f"stacked: side={self.side!r} must be 'input' or 'output', with shared=True")

    @property
    def member(self) -> Decomposition:
        """The decomposition of a member."""
        return decomposition(self.each)

    @property
    def family(self) -> str:
        return self.member.name

    @property
    def shares(self) -> bool:
        return self.shared

    def is_complete(self) -> bool:
        return self.member.is_complete() and (not self.shared or self.side is not None)

    def alternatives(self, shape: Shape) -> Sequence[Self]:
        if self.shared and self.side is None:
            return [replace(self, side=side) for side in get_args(Side)]
        return [self]

    def candidates(self, shape: Shape) -> list[Self]:
        if self.shared and self.side is None:
            every = [choice for kind in self.alternatives(shape) for choice in kind.candidates(shape)]
            return sorted(every, key=lambda choice: choice.num_params(shape))
        if not self.shared:
            each = self.member.candidates(self._member_shape(shape))
            return [replace(self, each=choice) for choice in each]
        full, rank = self._full_rank(shape), self._rank
        if rank is not None and rank > full:
            raise OptionError(f"stacked: rank={rank} of one shared factor exceeds {full}, the rank of {by(shape)}")
        return [replace(self, each=LowRank(rank=r)) for r in (range(1, full + 1) if rank is None else (rank,))]

    def num_params(self, shape: Shape) -> int:
        members, out, width = shape
        if not self.shared:
            return members * self.member.num_params(self._member_shape(shape))
        rank = self._closed_rank(shape)
        return rank * (members * out + width if self.side == "input" else out + members * width)

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        if not self.shared:
            each = self.member.complete(self._member_shape(shape), max_params // shape[0])
            return None if each is None else replace(self, each=each)
        fitting = [c for c in self.candidates(shape) if c.num_params(shape) <= max_params]
        return fitting[-1] if fitting else None

    def best_within(self, weight: Tensor, metric: Metric | None, max_params: int) -> Decomposition | None:
        shape = tuple(weight.shape)
        richest = [kind.complete(shape, max_params) for kind in self.alternatives(shape)]
        choices = [choice for choice in richest if choice is not None]
        if len(choices) < 2:
            return choices[0] if choices else None
        return min(choices, key=lambda choice: choice.error(weight, choice.fit(weight, metric), metric))

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FactorizedStack:
        if isinstance(self.member, LowRank):
            rank = self._closed_rank(shape)
            return LowRankStack(self, shape, rank, self.side, device=device, dtype=dtype)
        return MemberStack(self, self.member, shape, device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> FactorizedStack:
        metric = metric or Metric()
        shape = tuple(weight.shape)
        _check_metric(metric, shape)
        stack = self.empty(shape, device=weight.device, dtype=weight.dtype)
        if isinstance(stack, LowRankStack):
            self._fit_low_rank(stack, weight, metric)
        elif isinstance(stack, MemberStack):
            for number in range(len(weight)):
                stack.members[number] = self.member.fit(weight[number], metric.of(number))
        return stack

    def _fit_low_rank(self, stack: LowRankStack, weight: Tensor, metric: Metric) -> None:
        if self.shared:
            left, right = self._basis(weight, metric).fit(stack.rank)
            sides = (left, right) if self.side == "input" else (right.mT, left.mT)
            assign(stack.left, sides[0])
            assign(stack.right, sides[1])
            return
        for members in _batches(tuple(weight.shape), metric):
            left, right = truncated_in_metric(weight[members], stack.rank, metric.of(members))
            assign(stack.left[members], left)
            assign(stack.right[members], right)

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        metric = metric or Metric()
        shape = tuple(weight.shape)
        _check_metric(metric, shape)
        self.check(shape)
        if self.shared and self.side is None:
            return lowest(point for kind in self.alternatives(shape) for point in kind.curve(weight, metric))
        if isinstance(self.member, LowRank):
            return self._low_rank_curve(weight, metric)
        return self._summed_curve(weight, metric)

    def options(self) -> dict[str, Any]:
        each = spec_of(self.member)
        changed: dict[str, Any] = {} if each == {"low_rank": {}} else {"each": each}
        if self.shared:
            changed |= {"shared": True} | ({} if self.side is None else {"side": self.side})
        return changed

    def describe(self) -> str:
        shared = f", shared {self.side or 'factor'}" if self.shared else ""
        return f"stacked({self.member.describe()}{shared})"

    @property
    def _rank(self) -> int | None:
        return self.member.rank if isinstance(self.member, LowRank) else None

    def _full_rank(self, shape: Shape) -> int:
        members, out, width = shape
        return min(members * out, width) if self.side == "input" else min(out, members * width)

    def _closed_rank(self, shape: Shape) -> int:
        self.check(shape)
        if self._rank is None or not self.is_complete():
            raise OptionError(f"{self.describe()}: give a rank, and a side of a shared factor, or a budget")
        return self._rank

    def _member_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            self.shape_of(shape)  # raises the reason
            raise OptionError(f"stacked takes (members, out, in), not a {by(shape)} weight")
        return self.member.shape_of(shape[1:])

    def _basis(self, weight: Tensor, metric: Metric) -> SharedBasis:
        inner, outer = metric.ridged_input(), metric.ridged_output()
        return SharedBasis(weight, inner, outer) if self.side == "input" else SharedBasis(weight.mT, outer, inner)

    def _low_rank_curve(self, weight: Tensor, metric: Metric) -> list[Point]:
        """The exact errors of every rank, from one factorisation."""
        shape = tuple(weight.shape)
        if self.shared:
            errors = self._basis(weight, metric).errors().tolist()
        else:
            batches = _batches(shape, metric)
            parts = [squared_singular_values(weight[members], metric.of(members)).sum(0) for members in batches]
            tails = torch.stack(parts).sum(0).flip(0).cumsum(0).flip(0)  # as LowRank.curve
            errors = [*tails.tolist()[1:], 0.0]
        choices = [(c.num_params(shape), c, errors[int(c._rank or 0) - 1]) for c in self.candidates(shape)]
        smaller = [each for each in choices if each[0] < weight.numel()]
        return exact_curve([(params, choice) for params, choice, _ in smaller], [error for *_, error in smaller])

    def _summed_curve(self, weight: Tensor, metric: Metric) -> list[Point]:
        """The choices that the curves of all members have, with the sums of their errors."""
        members = range(len(weight))
        curves = [self.member.curve(weight[number], metric.of(number)) for number in members]
        errors = [{repr(point.decomposition): point.error for point in curve} for curve in curves]
        common = [p for p in curves[0] if all(repr(p.decomposition) in own for own in errors)]
        if not common:
            return super().curve(weight, metric)
        smaller = [(len(weight) * p.params, replace(self, each=p.decomposition)) for p in common]
        return exact_curve(smaller, [sum(own[repr(p.decomposition)] for own in errors) for p in common])


def stacked(kind: Decomposition) -> Decomposition:
    """Returns what the decomposition of a rule stands for at a stack of matrices: itself for each of them.

    `Auto` stands for its members applied to each matrix and, if `LowRank` is among them, for shared factors as well.
    """
    if kind.stacks:
        return kind
    if not isinstance(kind, Auto):
        return Stacked(each=kind)
    every: list[Decomposition] = []
    for member in kind.members:
        if not member.orders:  # of groups of weights
            continue
        every.append(stacked(member))
        if isinstance(member, LowRank):
            every += Stacked(each=member, shared=True).alternatives(())
    return Auto(among=tuple(dict.fromkeys(every)))


def _batches(shape: Shape, metric: Metric) -> Iterator[slice]:
    """The members in groups whose float64 matrices take at most `BATCH_BYTES`, or one that takes more."""
    members, out, width = shape
    moments = 3 * ((metric.input is not None) * width**2 + (metric.output is not None) * out**2)
    size = max(1, BATCH_BYTES // (8 * (2 * out * width + min(out, width) ** 2 + moments)))
    for start in range(0, members, size):
        yield slice(start, start + size)


def _check_metric(metric: Metric, shape: Shape) -> None:
    """Check that the moments are those of a stack.

    Raises:
        OptionError: when they are not.
    """
    for what, moment, size in (("input", metric.input, shape[-1]), ("output", metric.output, shape[-2])):
        if moment is not None and tuple(moment.shape) != (shape[0], size, size):
            raise OptionError(
                f"stacked: the {what} moment of {by(shape)} members must be {by((shape[0], size, size))}, not "
                f"{by(tuple(moment.shape))}: stacked is for layers of experts, and their calibration"
            )
