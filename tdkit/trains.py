"""How a TT-matrix multiplies: the cheapest pairwise order of x and its cores, or the matrix built core by core."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import opt_einsum
import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.contraction import Factors, Gradients, Structure
from tdkit.cost import Path, Product, Steps

Modes = tuple[int, ...]
OPTIMAL_CORES = 4  # up to this many the exhaustive search for the order takes milliseconds


@dataclass(frozen=True)
class TrainStructure(Structure):
    """Cores (rank, out mode, in mode, next rank); the matrix is padded to the product of its modes.

    The path 'cores' contracts x with the cores pair by pair, in opt_einsum's optimal order for the tokens.

    Sources: Novikov et al. (2015); Smith and Gray, opt_einsum (2018).
    """

    ranks: Modes  # (cores + 1), the outer two are 1
    out_modes: Modes
    in_modes: Modes

    @property
    def cores(self) -> tuple[Modes, ...]:
        """The shape of each core."""
        return tuple(zip(self.ranks[:-1], self.out_modes, self.in_modes, self.ranks[1:], strict=True))

    def build(self, factors: Factors) -> Tensor:
        return self._trains(factors)[-1][: self.shape[0], : self.shape[1], 0]

    def pullback(self, gradient: Tensor, factors: Factors) -> Gradients:
        trains = self._trains(factors[:-1])
        padding = (0, math.prod(self.in_modes) - self.shape[1], 0, math.prod(self.out_modes) - self.shape[0])
        rest = F.pad(gradient, padding).unsqueeze(2)  # the gradient of the train up to a core
        gradients: list[Tensor] = []
        for train, core in zip(reversed(trains), reversed(factors[1:]), strict=True):
            rows, columns, rank = train.shape
            _, m, n, next_rank = core.shape
            moved = (
                rest.reshape(rows, m, columns, n, next_rank).transpose(1, 2).reshape(rows * columns, m * n * next_rank)
            )
            gradients.append((train.reshape(-1, rank).T @ moved).reshape(core.shape))
            rest = (moved @ core.reshape(rank, -1).T).reshape(rows, columns, rank)
        return (rest.reshape(factors[0].shape), *reversed(gradients))

    def factor_paths(self, tokens: int) -> tuple[Path, ...]:
        return (_cores_path(self.cores, tokens),)

    def build_path(self) -> Path:
        products, moved = [], 0
        rows, columns = self.out_modes[0], self.in_modes[0]
        for rank, m, n, next_rank in self.cores[1:]:
            products.append(Product(rows * columns, rank, m * n * next_rank))
            rows, columns = rows * m, columns * n
            moved += rows * columns * next_rank
        return Path("build", tuple(products), 4 * len(products) + 2, moved)

    def multiply(self, x: Tensor, factors: Factors, path: Path) -> Tensor:
        padded = F.pad(x, (0, math.prod(self.in_modes) - self.shape[1]))
        out = _contract(padded.reshape(-1, *self.in_modes), factors, path.steps)
        return out.reshape(x.shape[0], math.prod(self.out_modes))[:, : self.shape[0]]

    def multiply_transposed(self, y: Tensor, factors: Factors, path: Path) -> Tensor:
        padded = F.pad(y, (0, math.prod(self.out_modes) - self.shape[0]))
        cores = [core.transpose(1, 2) for core in factors]
        out = _contract(padded.reshape(-1, *self.out_modes), cores, path.transposed_steps)
        return out.reshape(y.shape[0], math.prod(self.in_modes))[:, : self.shape[1]]

    def _trains(self, factors: Factors) -> list[Tensor]:
        """The products (rows, columns, rank) of the first core, the first two, and so on."""
        if not factors:
            return []
        first = factors[0]
        trains = [first.reshape(first.shape[1], first.shape[2], -1)]
        for core in factors[1:]:
            rank, m, n, next_rank = core.shape
            rows, columns, _ = trains[-1].shape
            joined = (trains[-1].reshape(-1, rank) @ core.reshape(rank, -1)).reshape(rows, columns, m, n, next_rank)
            trains.append(joined.transpose(1, 2).reshape(rows * m, columns * n, next_rank))
        return trains


def _contract(x: Tensor, cores: Factors, steps: Steps) -> Tensor:
    operands = [x, *cores]
    for first, second, equation in steps:
        right, left = operands.pop(second), operands.pop(first)
        operands.append(torch.einsum(equation, left, right))
    return operands[0]


@cache
def _cores_path(cores: tuple[Modes, ...], tokens: int) -> Path:
    """The path of x (tokens, *in_modes) through the cores, and of (tokens, *out_modes) through their transposes."""
    steps, products, moved = _pairwise(cores, tokens)
    back, _, _ = _pairwise(tuple((rank, n, m, next_rank) for rank, m, n, next_rank in cores), tokens)
    return Path("cores", products, 6 * len(steps) + 2, moved, steps, back)


def _pairwise(cores: tuple[Modes, ...], tokens: int) -> tuple[Steps, tuple[Product, ...], int]:
    """Steps, products and numbers moved of opt_einsum's order for x (tokens, *in_modes) and the cores."""
    count, symbol = len(cores), opt_einsum.get_symbol
    ins, outs = [symbol(1 + k) for k in range(count)], [symbol(1 + count + k) for k in range(count)]
    bonds = [symbol(1 + 2 * count + k) for k in range(count + 1)]
    terms = [symbol(0) + "".join(ins), *(bonds[k] + outs[k] + ins[k] + bonds[k + 1] for k in range(count))]
    shapes = [(tokens, *(core[2] for core in cores)), *cores]
    sizes = {s: n for term, shape in zip(terms, shapes, strict=True) for s, n in zip(term, shape, strict=True)}
    equation = ",".join(terms) + "->" + symbol(0) + "".join(outs)
    search = "optimal" if count <= OPTIMAL_CORES else "auto"
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=search)
    steps, products, moved = [], [], 0
    for (later, earlier), _, step, *_ in info.contraction_list:
        inputs, output = step.split("->")
        second, first = inputs.split(",")  # opt_einsum names the later operand first
        steps.append((earlier, later, f"{first},{second}->{output}"))
        batch = set(first) & set(second) & set(output)
        shared = (set(first) & set(second)) - batch
        free = [set(first) - shared - batch, shared, set(second) - shared - batch, batch]
        products.append(Product(*(_size(sizes, symbols) for symbols in free)))
        moved += _size(sizes, set(first)) + _size(sizes, set(output))
    return tuple(steps), tuple(products), moved


def _size(sizes: dict[str, int], symbols: set[str]) -> int:
    return math.prod(sizes[symbol] for symbol in symbols)
