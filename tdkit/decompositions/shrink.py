"""Fewer hidden units for several weights that share them: smaller dense layers instead of factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NoReturn, Self

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Point
from tdkit.decompositions.error_curve import exact_curve
from tdkit.decompositions.options import positive
from tdkit.errors import OptionError
from tdkit.fitting.metric import Metric
from tdkit.shapes import Shape

BY = ("loss", "leverage")
LEAST_STEP, MOST_STEP = 8, 64  # between numbers of units, see `Shrink.multiple`


@dataclass(frozen=True, kw_only=True)
class Shrink(Decomposition):
    """Remove hidden units from all weights that share them, and refit the weight that they feed.

    The weights stay dense and become smaller: the rows of the removed units go from the weights that produce them, the
    columns from the weight that consumes them. Its other columns are refitted to the calibration data. Which weights
    share units is found by `tdkit.models.groups` and tested by running the model; a rule with this decomposition must
    match all of them, and keeps weights dense that share no units with others.

    It stands for no factors of a single weight. What other decompositions read as the shape (out, in) of a weight is
    here that of a group: (units, parameters per unit).

    Args:
        units: how many stay; left open, the budget chooses it.
        uniform: the same number in all groups of a rule that have equally many. A model of transformers is then an
            ordinary one of its architecture with a smaller ``intermediate_size`` in its config.
        by: the units that cost least in the estimated loss are removed first ("loss"), or those with the least ridge
            leverage scores ("leverage", MoDeGPT's choice).
        multiple: the number of units that stay is a multiple of this one, where the budget chooses it. When None the
            largest power of two that is at most a sixteenth of the units, but at least 8 and at most 64, as products of
            such sizes are the fastest; 8 with `uniform`, and where all groups keep the same share, since a step is then
            one of all groups.
        temper: how far the numbers of units that the budget chooses for MLPs of one shape are moved towards their
            mean: 0 leaves them, 1 makes them equal. The estimated loss favours unequal ones too much.
        shared: names of weights, relative to a module that holds them all, that share their hidden units; the last one
            consumes them. For modules that no known pattern describes.

    Sources: Hassibi and Stork (1993); Frantar and Alistarh, Optimal Brain Compression (2022), section 4; leverage
    scores, Lin et al., MoDeGPT (2024), section 3.2.
    """

    name: ClassVar[str] = "shrink"
    orders: ClassVar[frozenset[int]] = frozenset()
    units: int | None = None
    uniform: bool = False
    by: str = "loss"
    multiple: int | None = None
    temper: float = 0.5
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        positive(self.name, "units", self.units)
        positive(self.name, "multiple", self.multiple)
        if not isinstance(self.uniform, bool):
            raise OptionError(f"shrink: uniform={self.uniform!r} must be true or false")
        is_number = isinstance(self.temper, int | float) and not isinstance(self.temper, bool)
        if not is_number or not 0 <= self.temper <= 1:
            raise OptionError(f"shrink: temper={self.temper!r} must be a number from 0 to 1")
        if self.by not in BY:
            raise OptionError(f"shrink: by={self.by!r} must be one of {', '.join(BY)}")
        shared = self.shared
        named = isinstance(shared, list | tuple) and all(isinstance(name, str) and name for name in shared)
        if not named or len(shared) == 1 or len(set(shared)) < len(shared):
            raise OptionError(
                f"shrink: shared={shared!r} must be the names of two or more weights, the one that consumes the hidden "
                "units last"
            )
        object.__setattr__(self, "shared", tuple(shared))

    def step(self, units: int) -> int:
        """The number that the units which stay of a group of `units` are a multiple of, where the loss chooses them."""
        if self.multiple is not None:
            return self.multiple
        most = LEAST_STEP if self.uniform else min(max(units // 16, LEAST_STEP), MOST_STEP)
        return 1 << (most.bit_length() - 1)

    def shape_of(self, shape: Shape) -> Shape:
        return shape

    def is_complete(self) -> bool:
        return self.units is not None

    def candidates(self, shape: Shape) -> list[Self]:
        if self.units is None:
            step = self.step(shape[0])
            return [replace(self, units=units) for units in range(step, shape[0] + 1, step)]
        if self.units > shape[0]:
            raise OptionError(f"shrink: units={self.units} is more than the {shape[0]} units of a group")
        return [self]

    def num_params(self, shape: Shape) -> int:
        if self.units is None:
            raise OptionError("shrink: units is open: a plan with a budget chooses it")
        return self.units * shape[1]

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        if self.units is not None:
            return super().complete(shape, max_params)
        step = self.multiple or LEAST_STEP
        units = min(max_params // shape[1], shape[0]) // step * step
        return replace(self, units=units) if units else None

    def curve_of(self, shape: Shape, errors: Tensor) -> list[Point]:
        """Returns the error curve of a group.

        Args:
            shape: (units, parameters per unit).
            errors: (units + 1,), entry k is the error without k units.
        """
        smaller = [(each.num_params(shape), each) for each in self.candidates(shape)]
        smaller = [(params, each) for params, each in smaller if each.units is not None and each.units < shape[0]]
        return exact_curve(smaller, [float(errors[shape[0] - (each.units or 0)]) for _, each in smaller])

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NoReturn:
        raise self._of_a_group()

    def fit(self, weight: Tensor, metric: Metric | None = None) -> NoReturn:
        raise self._of_a_group()

    def _of_a_group(self) -> OptionError:
        return OptionError("shrink: it is for weights that share hidden units, and gives a single one no factors")
