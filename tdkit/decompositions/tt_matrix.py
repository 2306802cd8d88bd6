"""W as a train of cores (rank, out mode, in mode, next rank): TT-SVD of the matrix with its modes interleaved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import Decomposition, FactorHolder, Point, assign, factor
from tdkit.decompositions.error_curve import sampled_curve
from tdkit.decompositions.options import integers, positive
from tdkit.decompositions.structured_matrix import StructuredMatrix
from tdkit.errors import OptionError
from tdkit.fitting.metric import Metric
from tdkit.fitting.tensor_train import bond_balanced, tt_svd
from tdkit.fitting.train_in_metric import fit_train, train_errors
from tdkit.products.train import TrainStructure
from tdkit.shapes import Shape, balanced_modes
from tdkit.support.compatibility import parameters_of, submodules_of

Modes = tuple[int, ...]


class Cores(FactorHolder):
    """A tuple of parameters, called ``0``, ``1`` and so on.

    Unlike ``nn.ParameterList`` it is called to get them, so that hooks on it run, such as those by which accelerate
    loads what is offloaded.
    """

    def __init__(self, cores: Iterable[nn.Parameter]) -> None:
        super().__init__()
        for number, core in enumerate(cores):
            self.register_parameter(str(number), core)
        self.names = tuple(parameters_of(self))

    def forward(self) -> tuple[Tensor, ...]:
        try:
            return tuple(map(parameters_of(self).__getitem__, self.names))
        except KeyError:  # one has a parametrization
            return tuple(getattr(self, name) for name in self.names)

    def __getitem__(self, number: int) -> Tensor:
        return self()[number]  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.names)


class TTMatrixMatrix(StructuredMatrix):
    """Cores (rank, out mode, in mode, next rank) of a matrix padded to the product of its modes."""

    def __init__(
        self,
        decomposition: TTMatrix,
        shape: Shape,
        ranks: Modes,  # (cores + 1), the outer two are 1
        out_modes: Modes,
        in_modes: Modes,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        structure = TrainStructure(shape, ranks, out_modes, in_modes)
        super().__init__(decomposition, structure)
        self.out_modes = out_modes
        self.in_modes = in_modes
        self.cores = Cores(
            factor(*core, axes=axes, device=device, dtype=dtype)
            for core, axes in zip(structure.cores, structure.layout, strict=True)
        )

    def factors(self) -> tuple[Tensor, ...]:
        cores: tuple[Tensor, ...] = submodules_of(self)["cores"]()
        return cores

    def rows(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        stride = math.prod(self.out_modes)
        row: Tensor | None = None  # (n, columns so far, rank)
        for m, core in zip(self.out_modes, self.factors(), strict=True):
            stride //= m
            picked = core[:, (flat // stride) % m].permute(1, 0, 2, 3)  # (n, rank, in mode, next rank)
            if row is None:
                row = picked[:, 0]
            else:
                joined = row @ picked.flatten(2)
                row = joined.reshape(-1, row.shape[1] * core.shape[2], core.shape[3])
        assert row is not None
        return row[:, : self.shape[1], 0].reshape(*ids.shape, self.shape[1])


MOST_CORES = 40  # with modes of 2, the cores of the largest weight (`tdkit.shapes.LARGEST`)


@dataclass(frozen=True, kw_only=True)
class TTMatrix(Decomposition):
    """A tensor train of `cores` cores, each carrying one mode of the rows and one of the columns.

    Args:
        ranks: one bound for every bond (cut to the full rank of each), or the cores - 1 ranks; left open,
            the budget chooses one bound for all.
        in_modes: how the columns split; the product may exceed their number, which is then padded, at no error.
            Left open with `ranks` given, balanced modes are chosen; left open with the ranks, the wide modes that keep
            most (`wide_modes`).
        out_modes: how the rows split, likewise; as many modes as `in_modes`.
        cores: number of cores when no modes are given.

    Sources: Oseledets (2011), algorithm 1; Novikov et al. (2015); Chekalina et al., TTM-GPT2 (2023).
    """

    name: ClassVar[str] = "tt_matrix"
    ranks: int | Modes | None = None
    in_modes: Modes | None = None
    out_modes: Modes | None = None
    cores: int = 3

    def __post_init__(self) -> None:
        positive(self.name, "cores", self.cores)
        if self.ranks is not None and not isinstance(self.ranks, int):
            object.__setattr__(self, "ranks", integers(self.name, "ranks", self.ranks))
        positive(self.name, "ranks", self.ranks if isinstance(self.ranks, int) else None)
        lengths = set()
        for option in ("in_modes", "out_modes"):
            if getattr(self, option) is not None:
                object.__setattr__(self, option, integers(self.name, option, getattr(self, option)))
                lengths.add(len(getattr(self, option)))
        if len(lengths) == 2:
            raise OptionError(f"tt_matrix: in_modes={self.in_modes} and out_modes={self.out_modes} differ in length")
        if lengths:
            object.__setattr__(self, "cores", lengths.pop())
        if self.cores is not None and self.cores > MOST_CORES:
            raise OptionError(f"{self.name}: cores={self.cores} must be at most {MOST_CORES}")
        if isinstance(self.ranks, tuple) and len(self.ranks) != self.cores - 1:
            raise OptionError(f"tt_matrix: {len(self.ranks)} ranks for {self.cores} cores; give {self.cores - 1}")

    def is_complete(self) -> bool:
        return self.ranks is not None

    def candidates(self, shape: Shape) -> list[Self]:
        if self.ranks is not None:
            self._closed_ranks(shape)
            return [self]
        out_modes, in_modes = self.out_modes, self.in_modes
        if out_modes is None and in_modes is None:
            out_modes, in_modes = self.modes(shape)  # written down: with ranks given, open modes are balanced ones
        return [
            replace(self, ranks=r, out_modes=out_modes, in_modes=in_modes)
            for r in range(1, max(self.full_ranks(shape), default=1) + 1)
        ]

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        candidates = self.candidates(shape)
        low, high = 0, len(candidates)  # parameters grow with the bound: bisect
        while low < high:
            middle = (low + high) // 2
            if candidates[middle].num_params(shape) <= max_params:
                low = middle + 1
            else:
                high = middle
        return candidates[low - 1] if low else None

    def num_params(self, shape: Shape) -> int:
        ranks = self._closed_ranks(shape)
        out_modes, in_modes = self.modes(shape)
        return sum(ranks[k] * m * n * ranks[k + 1] for k, (m, n) in enumerate(zip(out_modes, in_modes, strict=True)))

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TTMatrixMatrix:
        return TTMatrixMatrix(self, shape, self._closed_ranks(shape), *self.modes(shape), device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> TTMatrixMatrix:
        shape = (weight.shape[0], weight.shape[1])
        matrix = self.empty(shape, device=weight.device, dtype=weight.dtype)
        ranks, (out_modes, in_modes) = self._closed_ranks(shape), self.modes(shape)
        if metric is None:
            cores, _ = bond_balanced(tt_svd(weight, ranks, out_modes, in_modes))
        else:
            cores = fit_train(weight, metric, ranks, out_modes, in_modes)
        for parameter, core in zip(matrix.factors(), cores, strict=True):
            assign(parameter, core)
        return matrix

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        """See `Decomposition.curve`.

        In the metric a few points are fitted with few steps, so that `fit` does no worse, and the others lie
        between them.
        """
        shape = (weight.shape[0], weight.shape[1])
        self.check(shape)
        if metric is None:
            return super().curve(weight)
        smaller: list[tuple[int, TTMatrix]] = [(c.num_params(shape), c) for c in self.candidates(shape)]
        smaller = [(params, c) for params, c in smaller if params < weight.numel()]
        by_params = dict(smaller)

        def errors(params: list[int]) -> list[float]:
            ranks = [by_params[count]._closed_ranks(shape) for count in params]
            return train_errors(weight, metric, ranks, *self.modes(shape))

        return sampled_curve(smaller, weight.numel(), errors)

    def modes(self, shape: Shape) -> tuple[Modes, Modes]:
        """(out_modes, in_modes) for a matrix of `shape`: those given, or as the class says."""
        if self.ranks is None and self.out_modes is None and self.in_modes is None and self.cores > 1:
            return wide_modes(shape, self.cores)
        chosen = []
        for option, given, size in (("out_modes", self.out_modes, shape[0]), ("in_modes", self.in_modes, shape[1])):
            if given is not None and math.prod(given) < size:
                raise OptionError(
                    f"tt_matrix: {option}={given} span {math.prod(given)}, less than the dimension {size} of a "
                    f"{shape[0]}x{shape[1]} matrix"
                )
            chosen.append(given or balanced_modes(size, self.cores))
        return chosen[0], chosen[1]

    def full_ranks(self, shape: Shape) -> Modes:
        """The largest rank each bond can need."""
        sizes = [m * n for m, n in zip(*self.modes(shape), strict=True)]
        return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))

    def _closed_ranks(self, shape: Shape) -> Modes:
        full = self.full_ranks(shape)
        if self.ranks is None:
            raise OptionError(f"{self.describe()}: give ranks, or a budget that chooses them")
        if isinstance(self.ranks, int):
            if self.ranks > max(full, default=1):
                raise OptionError(
                    f"tt_matrix: ranks={self.ranks} is above the full ranks {full} of a {shape[0]}x{shape[1]} matrix"
                )
            return (1, *(min(self.ranks, f) for f in full), 1)
        if any(r > f for r, f in zip(self.ranks, full, strict=True)):
            raise OptionError(
                f"tt_matrix: ranks={self.ranks} are above the full ranks {full} of a {shape[0]}x{shape[1]} matrix"
            )
        return (1, *self.ranks, 1)


def wide_modes(shape: Shape, cores: int) -> tuple[Modes, Modes]:
    """(out_modes, in_modes) of a train that is nearly a low-rank product: a wide core for each side.

    The first core has a mode of 2 of the longer side and the last core the rest of it; the core before the last has
    the whole other side. At equal size such trains fit trained weights best, in the calibrated metric by far;
    balanced modes spend parameters on bonds that mix rows with columns.
    """
    rows, columns = shape
    split, whole = (rows, columns) if rows >= columns else (columns, rows)
    if split < 4:
        return balanced_modes(rows, cores), balanced_modes(columns, cores)
    half = -(-split // 2)
    longer, shorter = (2, *[1] * (cores - 2), half), (*[1] * (cores - 2), whole, 1)
    return (longer, shorter) if rows >= columns else (shorter, longer)
