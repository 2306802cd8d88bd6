"""In which order x is contracted with the cores of a train, which matrix products that makes, and what they cost."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import opt_einsum

from tdkit.products.cost import Path, Product
from tdkit.support.compatibility import constant_for_compile

Modes = tuple[int, ...]
Order = tuple[int, ...]  # in which x is contracted with the cores

EVERY_ORDER = 4  # up to this many cores all orders are compared; of more, opt_einsum's and the two sweeps
WIDE = 16  # columns below which a batch of small products is slower than one large product of permuted axes
# (measured with ``python tests/benchmarks/speed.py --parts eval``)


@dataclass(frozen=True)
class Stage:
    """The contraction with one core: a matrix (rows, inner) times a batch (tokens * left, inner, right).

    Attributes:
        core: its number.
        free, contracted: the axes of the core that make the rows, and the inner dimension.
    """

    core: int
    free: Modes
    contracted: Modes
    rows: int
    inner: int
    left: int
    right: int

    @property
    def axes(self) -> Modes:
        """The axes of the core, as they make the matrix."""
        return *self.free, *self.contracted

    @property
    def lying(self) -> Modes:
        """The order of the axes in memory that is read fastest by the product of one token: along the longer side."""
        return (*self.contracted, *self.free) if self.rows > self.inner else self.axes


@constant_for_compile
def stages(cores: tuple[Modes, ...], order: Order) -> tuple[Stage, ...]:
    """The contractions in an order."""
    return _stages(cores, order)


@cache
def _stages(cores: tuple[Modes, ...], order: Order) -> tuple[Stage, ...]:
    taken: set[int] = set()
    found = []
    for k in order:
        inner = [*([0] if k - 1 in taken else []), 2, *([3] if k + 1 in taken else [])]
        outer = [axis for axis in range(4) if axis not in inner]
        rows, columns = math.prod([cores[k][axis] for axis in outer]), math.prod([cores[k][axis] for axis in inner])
        sizes = [core[1] if i in taken else core[2] for i, core in enumerate(cores)]
        bonds = [core[3] if (i in taken) != (i + 1 in taken) else 1 for i, core in enumerate(cores)]
        left = math.prod(sizes[:k]) * math.prod(bonds[: max(k - 1, 0)])
        right = math.prod(sizes[k + 1 :]) * math.prod(bonds[k + 1 : -1])
        found.append(Stage(k, tuple(outer), tuple(inner), rows, columns, left, right))
        taken.add(k)
    return tuple(found)


def chain_path(cores: tuple[Modes, ...], order: Order, tokens: int, layout: tuple[Modes, ...], name: str) -> Path:
    """What an order costs, with the cores in memory as `layout` says."""
    products, backward, moved, moved_back, copied = [], [], 0, 0, 0
    steps = stages(cores, order)
    for place, stage in enumerate(steps):
        n, size = tokens * stage.left, stage.rows + stage.inner
        narrow = 1 < stage.right < WIDE
        whole = Product(n * stage.right, stage.inner, stage.rows)
        step = Product(stage.rows, stage.inner, stage.right, batch=n) if stage.right >= WIDE else whole
        products.append(step)
        moved += n * stage.right * size if narrow else 0
        if not _lies_ready(cores[stage.core], layout[stage.core], stage):
            copied += math.prod(cores[stage.core])
        backward += [step, Product(stage.rows, n * stage.right, stage.inner)]
        moved_back += n * stage.right * size * (2 if narrow else 1 if stage.right > 1 else 0)
        if place + 1 < len(steps):  # computed again
            backward.append(step)
            moved_back += n * stage.right * size if narrow else 0
    calls = 4 * len(steps) + 2
    again = Path("backward", tuple(backward), 3 * calls, moved_back + copied)
    return Path(name, tuple(products), calls, moved + copied, order, again)


def _lies_ready(core: Modes, layout: Modes, stage: Stage) -> bool:
    """Whether a core whose axes lie in memory as `layout` says is the stage's matrix, or its transpose, without a copy.

    Axes of one entry lie anywhere.
    """
    lying, free, inner = ([axis for axis in axes if core[axis] > 1] for axes in (layout, stage.free, stage.contracted))
    return lying in ([*free, *inner], [*inner, *free])


@cache
def layout_of(cores: tuple[Modes, ...]) -> tuple[Modes, ...]:
    """For each core the order of its axes in memory: as the fastest order for one token needs them."""
    best: tuple[float, tuple[Modes, ...]] | None = None
    for order in orders(cores, 1):
        lying = {stage.core: stage.lying for stage in stages(cores, order)}
        layout = tuple(lying[k] for k in range(len(cores)))
        seconds = chain_path(cores, order, 1, layout, "").seconds(threads=1)
        if best is None or seconds < best[0]:
            best = seconds, layout
    assert best is not None
    return best[1]


@cache
def orders(cores: tuple[Modes, ...], tokens: int) -> tuple[Order, ...]:
    """The orders of the cores that are compared."""
    forwards = tuple(range(len(cores)))
    if len(cores) <= EVERY_ORDER:
        return tuple(itertools.permutations(forwards))
    return tuple(dict.fromkeys((forwards, forwards[::-1], _searched(cores, tokens))))


def _searched(cores: tuple[Modes, ...], tokens: int) -> Order:
    """The order in which the cores join x on the path that opt_einsum finds. Source: Smith and Gray (2018)."""
    count, symbol = len(cores), opt_einsum.get_symbol
    ins, outs = [symbol(1 + k) for k in range(count)], [symbol(1 + count + k) for k in range(count)]
    bonds = [symbol(1 + 2 * count + k) for k in range(count + 1)]
    terms = [symbol(0) + "".join(ins), *(bonds[k] + outs[k] + ins[k] + bonds[k + 1] for k in range(count))]
    shapes = [(tokens, *(core[2] for core in cores)), *cores]
    equation = ",".join(terms) + "->" + symbol(0) + "".join(outs)
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")
    operands: list[Order] = [(), *((k,) for k in range(count))]
    order: Order = ()
    x = 0  # where x is among the operands
    for pair in path:
        joined = [operands[place] for place in sorted(pair)]
        if x in pair:
            order = (*order, *(core for core in itertools.chain(*joined) if core not in order))
        x = len(operands) - len(pair) if x in pair else x - sum(place < x for place in pair)
        operands = [operand for place, operand in enumerate(operands) if place not in pair]
        operands.append(tuple(itertools.chain(*joined)))
    return order
