"""What a decomposition and its factorised matrix must offer; everything else is derived from it."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.decompositions.options import integers, pair, positive
from tdkit.errors import OptionError
from tdkit.fitting.linalg import relative_error, working
from tdkit.fitting.metric import Metric
from tdkit.products.cached_tensor import GATHERED
from tdkit.products.convolution import Geometry, Stage
from tdkit.products.cost import DENSE, Path, Product
from tdkit.products.dispatch import Dispatcher, Preference, check_loaded
from tdkit.products.structure import Structure
from tdkit.shapes import Shape, by

__all__ = [
    "Decomposition",
    "FactorizedMatrix",
    "Point",
    "Preference",
    "assign",
    "factor",
    "integers",
    "pair",
    "positive",
]

CURVE_POINTS = 8  # fits made for the default error curve


class FactorHolder(nn.Module):
    """A module with factors as parameters, which knows those that FSDP gathers: see `tdkit.products.cached_tensor`.

    ``fully_shard`` assigns a parameter of its own before and after each forward pass, by ``setattr`` where a class
    overrides it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        before = vars(self).get("_parameters", {}).get(name)
        super().__setattr__(name, value)
        if type(value) is nn.Parameter and type(before) not in (type(None), nn.Parameter):
            setattr(value, GATHERED, True)


class FactorizedMatrix(FactorHolder, ABC):
    """A matrix of `shape` (out, in) held as factors.

    Factors are parameters; what is fixed (a permutation) is an integer buffer. Only `dense` must be
    written; `matmul` and `rows` are faster where the structure allows it.

    The factors of a tensor (out, in, *kernel) are those of the matrix (out, in * kernel).

    Args:
        decomposition: the complete decomposition that makes it.
        shape: of the weight, (out, in) or (out, in, *kernel).

    Attributes:
        decomposition: the complete decomposition that made it.
        shape: (out, in) or, for a tensor, (out, in * kernel).
        sizes: the shape of the weight, as given.
        error: relative error of the fit; None where there was none.
        structure: the integers that say how it multiplies, where they can be told; None for a plugin's matrix.
        dispatcher: takes the path of each product and caches the dense weight; `tdkit.prepare` configures it.
    """

    structure: Structure | None = None

    def __init__(self, decomposition: Decomposition, shape: Shape) -> None:
        super().__init__()
        self.decomposition = decomposition
        self.sizes: Shape = tuple(shape)
        self.shape: Shape = (shape[0], math.prod(shape[1:]))
        self.error: float | None = None
        self.dispatcher = Dispatcher()

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix itself, (out, in)."""

    def matmul(
        self,
        x: Tensor,  # (*batch, in)
    ) -> Tensor:  # (*batch, out)
        """``x @ dense().T``."""
        return F.linear(x, self.dense())

    def linear(
        self,
        x: Tensor,  # (*batch, in)
        bias: Tensor | None = None,  # (out,)
    ) -> Tensor:  # (*batch, out)
        """``x @ dense().T + bias`` by the cheapest path for this many rows of x."""
        return self.dispatcher.linear(self, x, bias)

    def forward(
        self,
        x: Tensor,  # (*batch, in), (*n,) integers below out, or (batch, channels, *spatial)
        bias: Tensor | None = None,  # (out,)
        geometry: Geometry | None = None,
    ) -> Tensor:  # (*batch, out), (*n, in), or (batch, out, *spatial)
        """`linear` for floating-point x, `rows` for integers; the convolution with a weight that is the matrix, if
        its `geometry` is given.

        Layers call the matrix as a module, so that hooks on it run, such as those by which accelerate loads its
        factors.

        Raises:
            TdkitError: when the factors are on the meta device and x is not.
        """
        if geometry is not None:
            return self.dispatcher.convolution(self, x, bias, geometry)
        if x.is_floating_point():
            return self.dispatcher.linear(self, x, bias)
        check_loaded(self.tensors(), x)
        return self.rows(x)

    def multiply(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor:
        """``x @ dense().T + bias`` by one of `paths`."""
        y = self.matmul(x)
        return y if bias is None else y + bias

    def paths(self, tokens: int) -> tuple[Path, ...]:
        """The paths to multiply `tokens` rows without a cached weight; a plugin has one, its `matmul`."""
        name = DENSE if type(self).matmul is FactorizedMatrix.matmul else "matmul"
        return (Path(name, (Product(tokens, self.multiply_adds(), 1),)),)

    def path(
        self,
        tokens: int,
        *,
        prefer: Preference | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Path:
        """The path that `linear` takes in eval mode for `tokens` rows: its name, multiply-adds and estimated time.

        Args:
            prefer: as `tdkit.prepare`; as this matrix is set when None.
            dtype: of x; the factors' own when None.
            device: where to run; the factors' own, or the CPU for factors on ``meta``, when None.
        """
        kind = torch.device(device).type if device is not None else self.device.type
        kind = "cpu" if kind == "meta" else kind
        return self.dispatcher.path(self, tokens, prefer=prefer, dtype=dtype or self.dtype, device=kind)

    def multiply_adds(self) -> int:
        """Multiply-adds of `matmul` for one row of x, when the factors are contracted one by one."""
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `dense`."""
        return self.tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of `dense`."""
        return self.tensors()[0].device

    @property
    def prefer(self) -> Preference:
        """What `tdkit.prepare` said; 'auto' at first."""
        return self.dispatcher.prefer

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that the factorised one is computed from."""
        return (*self.parameters(), *self.buffers())

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.dispatcher.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dispatcher.clear()
        with torch.inference_mode(False):  # as `factor`
            return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    @property
    def params(self) -> int:
        """Number of elements of the factors; integer buffers are counted by `indices`."""
        return sum(p.numel() for p in self.parameters())

    @property
    def held_as_buffers(self) -> int:
        """Number of those elements that are no parameters, because they are rounded to integers."""
        return 0

    @property
    def indices(self) -> int:
        """Number of elements of the integer buffers, such as permutations."""
        return sum(b.numel() for b in self.buffers() if not b.is_floating_point())

    def fault(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Returns what is wrong with tensors from a file as those of this matrix, or None.

        Integer buffers must have their dtype. A subclass that reads tensors by them checks their values too: an index
        beyond the end reads memory that is not the tensor's on a GPU.

        Args:
            tensors: by their names in the ``state_dict``, with the right shapes.
        """
        for name, buffer in self.named_buffers():
            given = tensors.get(name, buffer)
            if not buffer.is_floating_point() and given.dtype != buffer.dtype:
                return f"{name} holds {given.dtype}, not {buffer.dtype}"
        return None

    def extra_repr(self) -> str:
        return f"{by(self.sizes)}, {self.decomposition.describe()}, params={self.params}"

    def rows(
        self,
        ids: Tensor,  # (*n,) integers below out
    ) -> Tensor:  # (*n, in)
        """``dense()[ids]``, the look-up of an embedding."""
        return F.embedding(ids, self.dense())

    def convolutions(self, kernel: tuple[int, ...], groups: int) -> list[Stage] | None:
        """Returns smaller convolutions that one after the other equal the convolution with this weight.

        Args:
            kernel: the kernel sizes; the matrix is that of a weight (out, in / groups, *kernel).
            groups: the groups of the convolution.

        Returns:
            The stages with the factors as weights, or None if the factors do not form such a chain: the convolution
            then computes with the dense weight.
        """
        return None

    def lay_out_for_rows(self) -> None:
        """Make every factor contiguous, which is how `rows` reads it."""
        with torch.inference_mode(False):  # as `factor`
            for parameter in self.parameters():
                parameter.data = parameter.data.contiguous()


@dataclass(frozen=True)
class Point:
    """One choice on an error curve.

    Attributes:
        decomposition: complete.
        params: of its factors.
        error: tr(S E C E^T) of the fit, the squared Frobenius norm of E without a metric; not relative.
    """

    decomposition: Decomposition
    params: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Decomposition(ABC):
    """A way to write a matrix, or a tensor, as factors: a name and JSON-able options.

    An option left at None is open: `candidates` lists the ways to close it and `complete` picks one for
    a budget. A subclass sets `name`, writes `candidates`, `empty` and `fit`, and is registered through
    the entry-point group ``tdkit.decompositions``.

    Weights are (out, in, *kernel). A decomposition of matrices takes those of a higher order as the matrix
    (out, in * kernel); one of tensors sets `orders`. Either is given weights and shapes as `view` and `shape_of`
    return them.

    Attributes:
        orders: the numbers of dimensions that it takes.
        stacks: whether it takes stacks of matrices (members, out, in), each multiplied by rows of its own, and the
            metrics of stacks.
    """

    name: ClassVar[str]
    orders: ClassVar[frozenset[int]] = frozenset({2})
    stacks: ClassVar[bool] = False

    @abstractmethod
    def candidates(self, shape: Shape) -> list[Self]:
        """Fully specified choices for a matrix of `shape`, fewest parameters first.

        Raises:
            OptionError: when an option that is given cannot be met by `shape`.
        """

    @abstractmethod
    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FactorizedMatrix:
        """The module with uninitialised factors; on the ``meta`` device it costs nothing."""

    @abstractmethod
    def fit(self, weight: Tensor, metric: Metric | None = None) -> FactorizedMatrix:
        """The factors nearest to `weight` (out, in) or (out, in, *kernel), in its dtype and on its device.

        Args:
            weight: any float dtype; the computation runs in float64 (or float32) and is cast back.
            metric: calibrated second moments of the matrix (out, in * kernel) to measure the error in; the Frobenius
                norm when None.

        Raises:
            OptionError: when the options are open or cannot be met by the weight's shape.
        """

    def shape_of(self, shape: Shape) -> Shape:
        """Returns the shape in which it takes a weight of `shape` (out, in, *kernel): that one, or that of a matrix.

        Raises:
            OptionError: when it takes tensors of other orders only.
        """
        if len(shape) in self.orders:
            return shape
        if 2 in self.orders and len(shape) > 2:
            return shape[0], math.prod(shape[1:])
        orders = ", ".join(map(str, sorted(self.orders)))
        raise OptionError(f"{self.name} takes weights of {orders} dimensions, not a {by(shape)} one")

    def view(self, weight: Tensor) -> Tensor:
        """Returns `weight` (out, in, *kernel) in the shape that `shape_of` returns."""
        return weight.reshape(self.shape_of(tuple(weight.shape)))

    @property
    def family(self) -> str:
        """The name of the decomposition whose factors it makes: its own, unless it applies another one."""
        return self.name

    @property
    def shares(self) -> bool:
        """Whether the members of a stack share one of the factors."""
        return False

    def is_complete(self) -> bool:
        """Whether every option is given, so that `fit` knows what to do for any shape it accepts."""
        return all(getattr(self, f.name) is not None for f in dataclasses.fields(self))

    def check(self, shape: Shape) -> None:
        """Raise OptionError when the options that are given cannot be met by `shape`."""
        if not self.candidates(shape):
            raise OptionError(f"{self.describe()} has no choice for a {by(shape)} weight")

    def num_params(self, shape: Shape) -> int:
        """Parameters of the factors for a matrix of `shape`."""
        return self.empty(shape, device="meta").params

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        """The richest choice with at most `max_params` parameters; None when even the smallest is larger."""
        fitting = [c for c in self.candidates(shape) if c.num_params(shape) <= max_params]
        return fitting[-1] if fitting else None

    def best_within(self, weight: Tensor, metric: Metric | None, max_params: int) -> Decomposition | None:
        """The complete choice for `weight` (out, in) with at most `max_params` parameters; None when there is none.

        This default asks `complete`, which sees the shape only. A decomposition that stands for several
        `alternatives` measures them on the weight, in the metric when there is one.
        """
        return self.complete(tuple(weight.shape), max_params)

    def alternatives(self, shape: Shape) -> Sequence[Decomposition]:
        """The decompositions that this one stands for, of those that have a choice for `shape`: itself as a rule.

        A plan draws the error curve of each and picks one of them, layer by layer.

        Raises:
            OptionError: when none of several has a choice for `shape`.
        """
        return [self]

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        """The error at each size: choices in order of strictly rising params and strictly falling error.

        All have fewer parameters than the dense weight. This default fits a few candidates spread evenly over the
        logarithm of their size; a subclass that gets the whole curve from one factorisation overrides it.

        Args:
            weight: (out, in) or (out, in, *kernel).
            metric: as for `fit`.
        """
        shape = tuple(weight.shape)
        smaller = [(c.num_params(shape), c) for c in self.candidates(shape)]
        smaller = [(params, c) for params, c in smaller if params < weight.numel()]
        count = min(len(smaller), CURVE_POINTS)
        picked = sorted({round(len(smaller) ** ((i + 1) / count)) - 1 for i in range(count)}) if count else []
        points: list[Point] = []
        for params, candidate in (smaller[i] for i in picked):
            error = candidate.squared_error(weight, metric)
            if not points or (params > points[-1].params and error < points[-1].error):
                points.append(Point(candidate, params, error))
        return points

    def squared_error(self, weight: Tensor, metric: Metric | None = None) -> float:
        """The error of a fit, as on a curve (see `Point`)."""
        gap = working(weight.flatten(1)) - working(self.fit(weight, metric).dense())
        return metric.squared_error(gap) if metric else float(gap.square().sum())

    def error(self, weight: Tensor, matrix: FactorizedMatrix, metric: Metric | None = None) -> float:
        """Relative error of `matrix` as an approximation of `weight`, in the metric when there is one."""
        weight, dense = weight.flatten(1), matrix.dense()
        return metric.relative_error(weight, dense) if metric else relative_error(weight, dense)

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON-able values."""
        changed = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                changed[field.name] = list(value) if isinstance(value, tuple) else value
        return changed

    def describe(self) -> str:
        """``name(option=value, ...)`` with the options that are not defaults."""
        inner = ", ".join(
            f"{k}={'x'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in self.options().items()
        )
        return f"{self.name}({inner})"

    def __str__(self) -> str:
        return self.describe()


def factor(
    *size: int, axes: tuple[int, ...] | None = None, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """An uninitialised parameter of `size`; `axes` names the order of its axes in memory, the last running fastest.

    Also under ``torch.inference_mode()`` it is an ordinary tensor, with a version counter: what is computed from it
    can be cached, and it can be trained.
    """
    with torch.inference_mode(False):
        if axes is None:
            return nn.Parameter(torch.empty(*size, device=device, dtype=dtype))
        stored = torch.empty([size[axis] for axis in axes], device=device, dtype=dtype)
        return nn.Parameter(stored.permute([axes.index(axis) for axis in range(len(axes))]))


def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy `value` into `parameter`, cast to its dtype and device."""
    with torch.no_grad():
        parameter.copy_(value)
