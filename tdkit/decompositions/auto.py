"""One of several decompositions for each layer: whichever the calibrated loss says suits it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, FactorizedMatrix, Point
from tdkit.decompositions.error_curve import lowest
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import OptionError
from tdkit.fitting.metric import Metric
from tdkit.shapes import Shape

AMONG = ("shrink", "low_rank", "kronecker", "tucker", "spatial_low_rank", "cp")


@dataclass(frozen=True, kw_only=True)
class Auto(Decomposition):
    """Stands for several decompositions: a plan compares their error curves and picks one for each layer.

    It fits nothing itself: the plan replaces it by the decomposition picked.

    Args:
        among: decompositions, names, or ``{name: {option: value}}``. Each must take the weight's number of
            dimensions; of the default ones, those of tensors are for kernels of more than one position only. `Shrink`
            is for the MLPs of a model, where there are calibration batches to test that they share hidden units. A
            `TTMatrix` is not among the default ones: with its modes open it is a Kronecker sum.
    """

    name: ClassVar[str] = "auto"
    orders: ClassVar[frozenset[int]] = frozenset(range(2, 7))
    among: tuple[Decomposition | str | Mapping[str, Any], ...] = AMONG

    def __post_init__(self) -> None:
        if isinstance(self.among, str | Mapping) or not self.among:
            raise OptionError(f"auto: among={self.among!r} must be a list of decompositions")
        members = tuple(decomposition(member) for member in self.among)
        if any(isinstance(member, Auto) for member in members):
            raise OptionError("auto: among cannot hold auto itself")
        object.__setattr__(self, "among", members)

    @property
    def members(self) -> tuple[Decomposition, ...]:
        """The decompositions to choose from."""
        return tuple(decomposition(member) for member in self.among)

    def is_complete(self) -> bool:
        return False

    def check(self, shape: Shape) -> None:
        self.alternatives(shape)

    def candidates(self, shape: Shape) -> list[Any]:
        """Every choice of every member, fewest parameters first."""
        every = [each for member in self.alternatives(shape) for each in member.candidates(member.shape_of(shape))]
        return sorted(every, key=lambda choice: choice.num_params(choice.shape_of(shape)))

    def complete(self, shape: Shape, max_params: int) -> Any:
        """The richest choice of the first member that has one; `best_within` compares them on a weight."""
        found = (member.complete(member.shape_of(shape), max_params) for member in self.alternatives(shape))
        return next((choice for choice in found if choice is not None), None)

    def best_within(self, weight: Tensor, metric: Metric | None, max_params: int) -> Decomposition | None:
        """Of each member's richest choice with at most `max_params`, the one with the least error."""
        shape = tuple(weight.shape)
        richest = (member.best_within(member.view(weight), metric, max_params) for member in self.alternatives(shape))
        choices = [choice for choice in richest if choice is not None]
        return min(choices, key=lambda c: c.error(weight, c.fit(c.view(weight), metric), metric), default=None)

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        """The members' curves merged: each point is less in error than all smaller ones of every member."""
        members = self.alternatives(tuple(weight.shape))
        return lowest(point for member in members for point in member.curve(member.view(weight), metric))

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NoReturn:
        raise self._open()

    def fit(self, weight: Tensor, metric: Metric | None = None) -> FactorizedMatrix:
        raise self._open()

    def options(self) -> dict[str, Any]:
        forms = [next(iter(spec_of(m))) if not m.options() else spec_of(m) for m in self.members]
        return {} if tuple(forms) == AMONG else {"among": forms}

    def describe(self) -> str:
        return f"auto({', '.join(member.describe() for member in self.members)})"

    def alternatives(self, shape: Shape) -> list[Decomposition]:
        """The members that have a choice for `shape`; the first one's OptionError when none has.

        Raises:
            OptionError: also when a member that was asked for does not take the order of `shape`.
        """
        members = tuple(member for member in self.members if member.orders)  # the others are for groups of weights
        if not members:
            raise OptionError(f"{self.describe()} has no decomposition of a single weight")
        if not self.options():
            members = tuple(member for member in members if _is_default_for(member, shape))
        takes = [(member, member.shape_of(shape)) for member in members]
        possible, complaints = [], []
        for member, own in takes:
            try:
                member.check(own)
                possible.append(member)
            except OptionError as error:
                complaints.append(error)
        if not possible:
            raise complaints[0]
        return possible

    def _open(self) -> OptionError:
        return OptionError("auto: a plan with a budget picks the decomposition: fit the one it names")


def _is_default_for(member: Decomposition, shape: Shape) -> bool:
    """Whether a default member suits weights of `shape`: one of tensors is no better than a matrix for one position."""
    return 2 in member.orders or (len(shape) in member.orders and math.prod(shape[2:]) > 1)
