"""How a train of cores multiplies: one core after another, each by one plain matrix product.

A Kronecker sum is a train of two cores, whose bond counts the terms.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.products.contraction_order import WIDE, Modes, Order, Stage, chain_path, layout_of, orders, stages
from tdkit.products.cost import FEW, FUSED, Path, Product, chunk_of
from tdkit.products.kernels import SMALL
from tdkit.products.recording import is_recorded, needs_plain_operations
from tdkit.products.structure import Factors, Gradients, Structure, product
from tdkit.shapes import Shape


class ChainStructure(Structure):
    """Cores (rank, out mode, in mode, next rank); the matrix is padded to the product of its modes.

    With x as (tokens, *in_modes) the state is contracted with one core after another: over the core's in mode and
    its bonds to those neighbours that were contracted before. Its out mode and its other bonds take their place.
    These axes are adjacent, so each step is a matrix, the core, times a batch of matrices, in every order of the
    cores and without a permutation.

    Sources: Oseledets (2011), section 4; Novikov et al. (2015), section 4.
    """

    @property
    @abstractmethod
    def cores(self) -> tuple[Modes, ...]:
        """The shape of each core."""

    def to_cores(self, factors: Factors) -> Factors:
        """Views of the factors as cores."""
        return factors

    def from_cores(self, gradients: Gradients) -> Gradients:
        """The reverse of `to_cores`, for gradients."""
        return gradients

    def label(self, order: Order) -> str:
        """The name of the path that contracts with the cores in an order."""
        return f"cores {', '.join(str(core + 1) for core in order)}"

    @property
    def layout(self) -> tuple[Modes, ...]:
        """For each core the order of its axes in memory: the one that the fastest path for one token reads."""
        return layout_of(self.cores)

    def build(self, factors: Factors) -> Tensor:
        train = _trains(self.to_cores(factors))[-1][..., 0]
        return train if (self._rows, self._columns) == self.shape else train[: self.shape[0], : self.shape[1]]

    def pullback(self, gradient: Tensor, factors: Factors) -> Gradients:
        cores = self.to_cores(factors)
        trains = _trains(cores[:-1])
        rows, columns = self.shape
        padded = _padded(_padded(gradient, columns, self._columns).T, rows, self._rows).T
        rest = padded.unsqueeze(2)  # of the train up to a core
        gradients: list[Tensor | None] = []
        for train, core in zip(reversed(trains), reversed(cores[1:]), strict=True):
            rows, columns, rank = train.shape
            _, m, n, next_rank = core.shape
            moved = (
                rest.reshape(rows, m, columns, n, next_rank).transpose(1, 2).reshape(rows * columns, m * n * next_rank)
            )
            gradients.append((train.reshape(-1, rank).T @ moved).reshape(core.shape))
            rest = (moved @ core.reshape(rank, -1).T).reshape(rows, columns, rank)
        return self.from_cores((rest.reshape(cores[0].shape), *reversed(gradients)))

    def build_path(self) -> Path:
        products, moved = [], 0
        _, rows, columns, _ = self.cores[0]
        for rank, m, n, next_rank in self.cores[1:]:
            products.append(Product(rows * columns, rank, m * n * next_rank))
            rows, columns = rows * m, columns * n
            moved += rows * columns * next_rank
        return Path("build", tuple(products), 4 * len(products) + 2, moved)

    def factor_paths(self, tokens: int) -> tuple[Path, ...]:
        cores, layout = self.cores, self.layout
        return tuple(chain_path(cores, order, tokens, layout, self.label(order)) for order in orders(cores, tokens))

    def multiply(self, x: Tensor, factors: Factors, path: Path, bias: Tensor | None = None) -> Tensor:
        steps, cores = stages(self.cores, path.order), self.to_cores(factors)
        x = _padded(x, self.shape[1], self._columns)
        matrices = [_matrix(cores[stage.core], stage) for stage in steps]
        plain = needs_plain_operations()
        size = 0 if plain else chunk_of(x.shape[0], self._between(steps) * x.element_size(), x.device.type)
        if plain or size >= x.shape[0]:
            out = _forward(x, matrices, steps)
        elif torch.is_grad_enabled():
            out = torch.cat([_forward(x[start : start + size], matrices, steps) for start in range(0, len(x), size)])
        else:
            out = x.new_empty(x.shape[0], self._rows)
            for start in range(0, x.shape[0], size):
                out[start : start + size] = _forward(x[start : start + size], matrices, steps)
        out = out if _width(steps[-1]) == self.shape[0] else out[:, : self.shape[0]]
        return out if bias is None else out + bias if plain or torch.is_grad_enabled() else out.add_(bias)

    def factor_backward(
        self, gradient: Tensor, x: Tensor, factors: Factors, path: Path, needs_x: bool, needs_factors: Sequence[bool]
    ) -> tuple[Tensor | None, Gradients]:
        """Backward through the chain, in chunks of tokens; intermediate results are computed again."""
        steps, cores = stages(self.cores, path.order), self.to_cores(factors)
        x, gradient = _padded(x, self.shape[1], self._columns), _padded(gradient, self.shape[0], self._rows)
        matrices = [_matrix(cores[stage.core], stage) for stage in steps]
        wanted = [needs_factors[stage.core] for stage in steps]
        size = chunk_of(x.shape[0], 2 * self._between(steps) * x.element_size(), x.device.type)
        parts = [
            _backward(gradient[start : start + size], x[start : start + size], matrices, steps, needs_x, wanted)
            for start in range(0, max(x.shape[0], 1), size)
        ]
        grad_x = torch.cat([part[0] for part in parts if part[0] is not None]) if needs_x else None
        grads: list[Tensor | None] = [None] * len(cores)
        for place, stage in enumerate(steps):
            found = [part[1][place] for part in parts]
            if found[0] is not None:
                total = torch.stack([each for each in found if each is not None]).sum(0) if len(found) > 1 else found[0]
                shape = [cores[stage.core].shape[axis] for axis in stage.axes]
                grads[stage.core] = total.reshape(shape).permute([stage.axes.index(axis) for axis in range(4)])
        return None if grad_x is None else grad_x[:, : self.shape[1]], self.from_cores(tuple(grads))

    @property
    def _rows(self) -> int:
        return math.prod([core[1] for core in self.cores])

    @property
    def _columns(self) -> int:
        return math.prod([core[2] for core in self.cores])

    def _between(self, steps: tuple[Stage, ...]) -> int:
        """Elements per token of the largest intermediate result; 0 for a single product."""
        return max([stage.left * stage.rows * stage.right for stage in steps[:-1]], default=0)


@dataclass(frozen=True)
class TrainStructure(ChainStructure):
    """A TT-matrix: ranks (cores + 1), the outer two of which are 1, and the modes of both sides."""

    ranks: Modes
    out_modes: Modes
    in_modes: Modes

    @property
    def cores(self) -> tuple[Modes, ...]:
        return tuple(zip(self.ranks[:-1], self.out_modes, self.in_modes, self.ranks[1:], strict=True))


@dataclass(frozen=True)
class KroneckerStructure(ChainStructure):
    """sum_r A[r] kron B[r], with A (terms, a1, a2) and B (terms, b1, b2)."""

    terms: int
    a: Shape
    b: Shape

    @property
    def cores(self) -> tuple[Modes, ...]:
        return (1, *self.a, self.terms), (self.terms, *self.b, 1)

    def to_cores(self, factors: Factors) -> Factors:
        a, b = factors
        return a.permute(1, 2, 0).unsqueeze(0), b.unsqueeze(3)

    def from_cores(self, gradients: Gradients) -> Gradients:
        a, b = gradients
        return None if a is None else a.squeeze(0).permute(2, 0, 1), None if b is None else b.squeeze(3)

    def label(self, order: Order) -> str:
        return ", ".join("AB"[core] for core in order)

    def kernel_paths(self, tokens: int) -> tuple[Path, ...]:
        b_is_small = math.prod(self.b) <= math.prod(self.a)
        (rows, columns), small = (self.a, self.b) if b_is_small else (self.b, self.a)
        if max(*small, self.terms) > SMALL:
            return ()
        product = Product(tokens * small[1], columns, self.terms * rows)
        return (Path(FUSED, (product,), order=(0, 1) if b_is_small else (1, 0)),)

    @property
    def a_axes(self) -> Modes:
        """The order of A's axes (term, row, column) in memory."""
        return tuple({1: 1, 2: 2, 3: 0}[axis] for axis in self.layout[0] if axis != 0)

    @property
    def b_axes(self) -> Modes:
        """The order of B's axes (term, row, column) in memory."""
        return tuple(axis for axis in self.layout[1] if axis != 3)


def _matrix(core: Tensor, stage: Stage) -> Tensor:
    """The core as (rows, inner); a view where it lies in memory as the stage needs it."""
    return core.permute(stage.axes).reshape(stage.rows, stage.inner)


def _forward(x: Tensor, matrices: Sequence[Tensor], steps: Sequence[Stage]) -> Tensor:
    state, tokens = x, x.shape[0]
    for matrix, stage in zip(matrices, steps, strict=True):
        state = _times(matrix, state.reshape(tokens * stage.left, stage.inner, stage.right), stage.right)
    return state.reshape(tokens, _width(steps[-1]))


def _width(stage: Stage) -> int:
    """The numbers per token after a stage."""
    return stage.left * stage.rows * stage.right


def _backward(
    gradient: Tensor,
    x: Tensor,
    matrices: Sequence[Tensor],
    steps: Sequence[Stage],
    needs_x: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of every stage's matrix."""
    tokens, states = x.shape[0], [x]
    for matrix, stage in zip(matrices[:-1], steps, strict=False):
        state = states[-1].reshape(tokens * stage.left, stage.inner, stage.right)
        states.append(_times(matrix, state, stage.right))
    found: list[Tensor | None] = [None] * len(steps)
    for place in reversed(range(len(steps))):
        stage = steps[place]
        out = gradient.reshape(tokens * stage.left, stage.rows, stage.right)
        if wanted[place]:
            found[place] = _outer(out, states[place].reshape(tokens * stage.left, stage.inner, stage.right))
        if not needs_x and not any(wanted[:place]):
            break
        gradient = _times(matrices[place].T, out, stage.right)
    return gradient.reshape(x.shape) if needs_x else None, found


def _times(
    matrix: Tensor,  # (rows, inner)
    batch: Tensor,  # (n, inner, right)
    right: int,
) -> Tensor:  # (n, rows, right)
    if right == 1:
        return product(batch.squeeze(2), matrix).unsqueeze(2)
    if right >= WIDE:
        return torch.matmul(matrix, batch)
    if right <= FEW and not is_recorded() and batch.shape[0] == 1:
        return product(batch[0].T, matrix).T.unsqueeze(0)
    return F.linear(batch.transpose(1, 2), matrix).transpose(1, 2)


def _outer(
    out: Tensor,  # (n, rows, right)
    batch: Tensor,  # (n, inner, right)
) -> Tensor:  # (rows, inner)
    """The sum over n and right of the outer products."""
    if out.shape[2] == 1:
        return out.squeeze(2).T @ batch.squeeze(2)
    return out.transpose(0, 1).flatten(1) @ batch.transpose(0, 1).flatten(1).T


def _trains(cores: Factors) -> list[Tensor]:
    """The products (rows, columns, rank) of the first core, the first two, and so on."""
    if not cores:
        return []
    first = cores[0]
    trains = [first.reshape(first.shape[1], first.shape[2], -1)]
    for core in cores[1:]:
        rank, m, n, next_rank = core.shape
        rows, columns, _ = trains[-1].shape
        joined = (trains[-1].reshape(-1, rank) @ core.reshape(rank, -1)).reshape(rows, columns, m, n, next_rank)
        trains.append(joined.transpose(1, 2).reshape(rows * m, columns * n, next_rank))
    return trains


def _padded(
    x: Tensor,  # (n, width)
    width: int,
    columns: int,
) -> Tensor:  # (n, columns)
    return x if width == columns else F.pad(x, (0, columns - width))
