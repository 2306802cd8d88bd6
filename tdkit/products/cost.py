"""What a path costs: its matrix products, its copies, and an estimate of its time on a device.

The estimate only ranks the paths of one product, so a few rates per device are enough. The rates and constants of
the CPU were measured with ``python tests/benchmarks/speed.py --parts eval,decode`` (float32, one and two threads);
those of CUDA are round figures of a data-centre card, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from tdkit.shapes import Shape

DENSE = "dense"  # the path that builds the weight, in every structure
CACHED = "dense, cached"  # the same with the weight cached between calls
FUSED = "fused"  # a Triton kernel of `tdkit.products.kernels`, in every structure that has one
GRAPH = "cuda graph"  # stands for the device "cuda" where a graph replays the calls: a launch costs little
KERNEL_DEVICES = ("cuda", GRAPH)  # on which the Triton kernels run
MARGIN = 0.85  # of the time of a cached weight, below which factors are preferred to it; the same for Triton kernels
# and the library's calls
FEW = 3  # products of 2 to 3 rows are fastest on a CPU with the operands swapped and transposed
FEW_MARGIN = 0.6  # MARGIN for these: a cached weight is multiplied up to 1.9 x as fast as the estimate says
LARGE = 4  # a layer's weight, this many times larger than all else in a product, is read from main memory
FEW_ROWS = 16  # up to this many rows a GPU multiplies while it reads the matrix
KERNEL_SHARE = 0.5  # of the rate of a large product that a Triton kernel reaches
BOUNDS = (1, 2, FEW, *(2**k for k in range(2, 17)))  # tokens at which the paths are compared
CHUNK_BYTES = 3 * 2**20  # of an intermediate result; 1 to 4 MiB were equally fast with 1 MiB of L2 per core


@dataclass(frozen=True)
class Product:
    """`batch` matrix products (m, k) @ (k, n)."""

    m: int
    k: int
    n: int
    batch: int = 1

    @property
    def multiply_adds(self) -> int:
        return self.batch * self.m * self.k * self.n

    @property
    def elements(self) -> int:
        """Numbers read and written."""
        return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass(frozen=True)
class Path:
    """One way to compute the product of a batch and a factorised matrix.

    Attributes:
        name: 'dense' builds the weight, 'fused' is a Triton kernel; other names are the structure's own.
        products: the matrix products, in order.
        calls: operations on tensors, each of which takes a fixed time however small it is.
        moved: elements copied from one layout to another in between.
        order: in which the factors are contracted, where the path has a choice.
        backward: what the gradients of x and of the factors cost.
    """

    name: str
    products: tuple[Product, ...]
    calls: int = 1
    moved: int = 0
    order: tuple[int, ...] = ()
    backward: Path | None = field(default=None, repr=False)

    @property
    def multiply_adds(self) -> int:
        return sum(product.multiply_adds for product in self.products)

    def seconds(
        self,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        threads: int | None = None,
        *,
        training: bool = False,
    ) -> float:
        """The estimated time on a device type ('cpu', 'cuda', ...), with the backward pass in training.

        Infinite for a Triton kernel where it cannot run.
        """
        if self.name == FUSED and device not in KERNEL_DEVICES:
            return math.inf
        rates = rates_of(device, dtype, threads or torch.get_num_threads())
        if self.name == FUSED:
            rates = rates.of_kernels()
        copies = self.moved * dtype.itemsize / rates.copy_bytes
        fixed = self.calls * rates.call
        time = fixed + copies + sum(_seconds(product, rates, dtype.itemsize) for product in self.products)
        if training and self.backward is not None:
            time += self.backward.seconds(dtype, device, threads)
        return time


@dataclass(frozen=True)
class Rates:
    """Rates of one device for one dtype, per second.

    Attributes:
        multiply_adds: of a large product.
        half_size: the smallest dimension at which a product reaches half that rate.
        floor: the least share of that rate, reached by a product with a dimension of 1.
        cached_bytes, bytes: read by products whose operands fit in the last-level cache, or do not. A layer's
            weight comes from main memory: the other layers' have replaced it in the cache.
        cache: size of that cache in bytes.
        copy_bytes: written by a copy that reorders axes.
        call: seconds that an operation takes at least, its code no longer in the caches.
        launch: the same for a Triton kernel.
        few_rows: the share of `bytes` at which a library reads the matrix of a product with few rows while it
            multiplies; None where it reads first and multiplies then.
    """

    multiply_adds: float
    half_size: float
    floor: float
    cached_bytes: float
    bytes: float
    cache: float
    copy_bytes: float
    call: float
    launch: float
    few_rows: float | None = None

    def of_kernels(self) -> Rates:
        """The rates of Triton kernels on the same device."""
        return replace(self, multiply_adds=self.multiply_adds * KERNEL_SHARE, call=self.launch, few_rows=1.0)


def rates_of(device: str, dtype: torch.dtype, threads: int) -> Rates:
    """The rates of a device type; those of the CPU grow with the number of threads."""
    if device == "cpu":
        speed = 45e9 * threads * {8: 0.5}.get(dtype.itemsize, 1.0)
        memory = 25e9 * max(1.0, threads / 4)
        return Rates(speed, 5, 0.3, 55e9 * threads, memory, 16e6, 8e9 * threads, 6e-6, 6e-6)
    speed = {8: 5e12, 4: 20e12}.get(dtype.itemsize, 300e12)
    call, launch = (1.5e-6, 1.5e-6) if device == GRAPH else (6e-6, 12e-6)  # Triton launches through more Python
    return Rates(speed, 64, 0.02, 2e12, 2e12, 40e6, 1e12, call, launch, few_rows=0.7)


def _seconds(product: Product, rates: Rates, itemsize: int) -> float:
    smallest = min(product.m, product.k, product.n)
    share = max(smallest / (smallest + rates.half_size), rates.floor)
    size = product.elements * itemsize
    large = product.batch * product.k * max(product.m, product.n)
    is_weight = product.k > FEW_ROWS and large >= LARGE * (product.elements - large)
    reading = size / (rates.cached_bytes if size <= rates.cache and not is_weight else rates.bytes)
    # a matrix times a vector is bound by reading the matrix
    multiplying = 0.0 if smallest == 1 else product.multiply_adds / (rates.multiply_adds * share)
    if rates.few_rows is not None and smallest <= FEW_ROWS:
        return max(reading / rates.few_rows, multiplying)
    return reading + multiplying


PathTable = tuple[tuple[int, Path], ...]  # (the most tokens it serves, path), ascending; the last serves all above


def path_table(
    paths: Callable[[int], tuple[Path, ...]],
    shape: Shape,
    *,
    dtype: torch.dtype,
    device: str,
    threads: int,
    cached: bool,
    training: bool = False,
) -> PathTable:
    """The cheapest path for every number of tokens, compared at the numbers of `BOUNDS`.

    Args:
        paths: to multiply a number of tokens; one of them is named 'dense'.
        shape: (out, in) of the matrix.
        cached: compare with a cached weight rather than one that every call builds.
        training: compare with the backward pass included.
    """
    table: list[tuple[int, Path]] = []
    for tokens in BOUNDS:
        is_few = device == "cpu" and 2 <= tokens <= FEW
        handicap = {CACHED: FEW_MARGIN if is_few else MARGIN, FUSED: 1 / MARGIN}
        own = paths(tokens)
        if cached:
            own = (*(path for path in own if path.name != DENSE), cached_path(tokens, shape))
        best = min(
            own,
            key=lambda path: path.seconds(dtype, device, threads, training=training) * handicap.get(path.name, 1.0),
        )
        if table and table[-1][1].name == best.name:
            table.pop()
        table.append((tokens, best))
    return tuple(table)


def cached_path(tokens: int, shape: Shape) -> Path:
    """The path that multiplies `tokens` rows by a cached weight of `shape` (out, in)."""
    return Path(CACHED, (Product(tokens, shape[1], shape[0]),))


def lookup(table: PathTable, tokens: int) -> Path:
    """The path of a table for a number of tokens."""
    for bound, path in table[:-1]:
        if tokens <= bound:
            return path
    return table[-1][1]


def chunk_of(tokens: int, bytes_per_token: int, device: str) -> int:
    """How many tokens to multiply at once so that intermediate results stay in the cache of a CPU."""
    if device != "cpu" or bytes_per_token == 0:
        return max(tokens, 1)
    return max(1, CHUNK_BYTES // bytes_per_token)
