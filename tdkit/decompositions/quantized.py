"""Factors, then bits: the factors of another decomposition, or the weight itself, rounded to 8 or 4 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tdkit.decompositions.base import Decomposition, FactorizedMatrix, factor
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import OptionError, TdkitError
from tdkit.fitting.metric import Metric
from tdkit.fitting.quantization import Bits, Codes, Grid
from tdkit.products.convolution import Stage
from tdkit.products.cost import Path
from tdkit.shapes import Shape

GROUPS = {8: 64, 4: 32}  # numbers that share a step; 8.25 and 5 bits per number


class _Plain(FactorizedMatrix):
    """The weight itself."""

    def __init__(self, decomposition: Decomposition, shape: Shape, dtype: torch.dtype | None) -> None:
        super().__init__(decomposition, shape)
        self.weight = factor(shape[0], math.prod(shape[1:]), device="meta", dtype=dtype)

    def dense(self) -> Tensor:
        return self.weight


class _Call(nn.Module):
    """Calls a method of a matrix, for `functional_call`, which calls ``forward`` alone."""

    def __init__(self, matrix: FactorizedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self.matrix, method)(*args)


class QuantizedMatrix(FactorizedMatrix):
    """The matrix of another decomposition with rounded factors, which every product decodes again.

    The codes are integer buffers: they are not trained, and a cast of the model to another dtype changes only the
    dtype in which it computes.
    """

    decomposition: Quantized

    def __init__(
        self, decomposition: Quantized, shape: Shape, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__(decomposition, shape)
        inner = decomposition.skeleton(shape, dtype)
        vars(self)["_call"] = _Call(inner)  # on the meta device, and no submodule: it holds no numbers
        self.grid = decomposition.grid
        self.layouts = {name: _layout(parameter) for name, parameter in inner.named_parameters()}
        for name, parameter in inner.named_parameters():
            self._hold(name, self.grid.empty(parameter.numel(), device=device))
        for name, buffer in inner.named_buffers():
            self.register_buffer(_flat(name), torch.empty_like(buffer, device=device))
        self._dtype = dtype or torch.get_default_dtype()

    @property
    def inner(self) -> FactorizedMatrix:
        """The matrix that the codes stand for, without numbers."""
        call: _Call = vars(self)["_call"]
        return call.matrix

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype  # a cast leaves integers as they are
        return super()._apply(fn, recurse)

    def assign_codes(self, matrix: FactorizedMatrix) -> None:
        """Round the factors of `matrix`, of the same decomposition and shape."""
        for name, parameter in matrix.named_parameters():
            order, _ = self.layouts[name]
            self._hold(name, self.grid.encode(parameter.detach().permute(order).reshape(-1)))
        for name, buffer in matrix.named_buffers():
            cast(Tensor, getattr(self, _flat(name))).copy_(buffer)

    def fault(self, tensors: Mapping[str, Tensor]) -> str | None:
        inside = {name: tensors[_flat(name)] for name, _ in self.inner.named_buffers() if _flat(name) in tensors}
        return super().fault(tensors) or self.inner.fault(inside)

    def factors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the factors, decoded, and the buffers, by their names in `inner`."""
        decoded = {name: self._decoded(name, dtype) for name in self.layouts}
        return decoded | {name: getattr(self, _flat(name)) for name, _ in self.inner.named_buffers()}

    def dense(self) -> Tensor:
        return cast(Tensor, self._run(self.dtype, "dense"))

    def matmul(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._run(x.dtype, "linear", x))

    def multiply(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor:
        return cast(Tensor, self._run(x.dtype, "linear", x, bias))

    def rows(self, ids: Tensor) -> Tensor:
        width = self.shape[1]
        if not isinstance(self.inner, _Plain) or width % self.grid.group:
            return cast(Tensor, self._run(self.dtype, "rows", ids))
        codes = self._codes("weight")  # each row has groups of its own
        values, steps, zeros = (
            None if code is None else F.embedding(ids, code.view(self.shape[0], -1)) for code in codes
        )
        assert values is not None
        assert steps is not None
        flat = self.grid.decode_groups(
            values.flatten(), steps.flatten(), None if zeros is None else zeros.flatten(), self.dtype
        )
        return flat.view(*ids.shape, width)

    def convolutions(self, kernel: tuple[int, ...], groups: int) -> list[Stage] | None:
        return cast("list[Stage] | None", self._run(self.dtype, "convolutions", kernel, groups))

    def paths(self, tokens: int) -> tuple[Path, ...]:
        return self.inner.paths(tokens)

    def multiply_adds(self) -> int:
        return self.inner.multiply_adds()

    @property
    def params(self) -> int:
        return self.inner.params

    @property
    def indices(self) -> int:
        return self.inner.indices

    @property
    def held_as_buffers(self) -> int:
        return self.params

    def _run(self, dtype: torch.dtype, method: str, *args: Any) -> Any:
        factors = {f"matrix.{name}": tensor for name, tensor in self.factors(dtype).items()}
        return functional_call(vars(self)["_call"], factors, (method, *args), tie_weights=False)

    def _hold(self, name: str, codes: Codes) -> None:
        for part, tensor in zip(Codes._fields, codes, strict=True):
            self.register_buffer(f"{_flat(name)}_{part}", tensor)

    def _codes(self, name: str) -> Codes:
        return Codes(*(getattr(self, f"{_flat(name)}_{part}") for part in Codes._fields))

    def _decoded(self, name: str, dtype: torch.dtype) -> Tensor:
        order, sizes = self.layouts[name]
        flat = self.grid.decode(self._codes(name), math.prod(sizes), dtype)
        back = [order.index(axis) for axis in range(len(order))]
        return flat.view(sizes).permute(back)


@dataclass(frozen=True, kw_only=True)
class Quantized(Decomposition):
    """The factors of another decomposition, or the weight itself, rounded to 8 or 4 bits.

    Groups of numbers that lie next to each other in memory share a step of two bytes, and with 4 bits a zero of two
    bytes. A factor lies in memory along its longer side, such as a column of the left factor of `LowRank`, so that
    numbers of the same size share a step. Products decode the factors in every call: this saves memory, not time.

    The number of parameters stays that of the decomposition; what shrinks is their bytes.

    Args:
        of: the decomposition, its name, or ``{name: {option: value}}``; the weight itself when None.
        bits: 8 or 4 per number.
        group: numbers that share a step; 64 with 8 bits, 32 with 4, when 0.

    Sources: 8 bits, round to nearest; 4 bits, Badri and Shaji, half-quadratic quantization (2023).
    """

    name: ClassVar[str] = "quantized"
    of: Decomposition | str | Mapping[str, Any] | None = None
    bits: Bits = 8
    group: int = 0

    def __post_init__(self) -> None:
        if self.of is not None:
            try:
                kind = decomposition(self.of)
            except TdkitError as error:
                raise OptionError(f"quantized: of={self.of!r}: {error}") from None
            if isinstance(kind, Quantized):
                raise OptionError(f"quantized: of={kind.describe()} is quantized already")
            object.__setattr__(self, "of", kind)
        try:
            _ = self.grid
        except OptionError as error:
            raise OptionError(f"quantized: {error}") from None

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group or GROUPS.get(self.bits, 0))

    @property
    def factors(self) -> Decomposition | None:
        """The decomposition whose factors are rounded."""
        return None if self.of is None else decomposition(self.of)

    @property
    def family(self) -> str:
        return self.name if self.factors is None else self.factors.family

    def shape_of(self, shape: Shape) -> Shape:
        return shape if self.factors is None else self.factors.shape_of(shape)

    def is_complete(self) -> bool:
        return self.factors is None or self.factors.is_complete()

    def candidates(self, shape: Shape) -> list[Self]:
        return [self] if self.factors is None else [replace(self, of=kind) for kind in self.factors.candidates(shape)]

    def alternatives(self, shape: Shape) -> Sequence[Self]:
        if self.factors is None:
            return [self]
        kinds = self.factors.alternatives(shape)
        return [self] if list(kinds) == [self.factors] else [replace(self, of=kind) for kind in kinds]

    def num_params(self, shape: Shape) -> int:
        return math.prod(shape) if self.factors is None else self.factors.num_params(shape)

    def complete(self, shape: Shape, max_params: int) -> Self | None:
        if self.factors is None:
            return self if math.prod(shape) <= max_params else None
        kind = self.factors.complete(shape, max_params)
        return None if kind is None else replace(self, of=kind)

    def skeleton(self, shape: Shape, dtype: torch.dtype | None = None) -> FactorizedMatrix:
        """Returns the matrix whose factors are rounded, on the meta device."""
        if self.factors is None:
            return _Plain(self, shape, dtype)
        return self.factors.empty(shape, device="meta", dtype=dtype)

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> QuantizedMatrix:
        return QuantizedMatrix(self, shape, device=device, dtype=dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> QuantizedMatrix:
        if self.factors is not None:
            return quantized(self.factors.fit(weight, metric), self.bits, self.group)
        plain = _Plain(self, tuple(weight.shape), weight.dtype)
        plain.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=False)
        return self._rounded(plain)

    def options(self) -> dict[str, Any]:
        found = super().options()
        return found if self.factors is None else found | {"of": spec_of(self.factors)}

    def describe(self) -> str:
        inner = "weight" if self.factors is None else self.factors.describe()
        return f"int{self.bits}({inner})"

    def _rounded(self, matrix: FactorizedMatrix) -> QuantizedMatrix:
        some = next(_floats(matrix))
        made = self.empty(matrix.sizes, device=some.device, dtype=some.dtype)
        made.assign_codes(matrix)
        made.error = matrix.error
        return made.train(matrix.training)


def quantized(matrix: FactorizedMatrix, bits: Bits = 8, group: int = 0) -> QuantizedMatrix:
    """Returns a matrix with the factors of `matrix` rounded; see `Quantized`.

    Raises:
        OptionError: for bits and groups that are not supported, or when torchao is not installed.
    """
    if isinstance(matrix, QuantizedMatrix):
        raise OptionError(f"{matrix.decomposition.describe()} is quantized already")
    return Quantized(of=matrix.decomposition, bits=bits, group=group)._rounded(matrix)


def _floats(matrix: FactorizedMatrix) -> Iterator[Tensor]:
    return (tensor for tensor in matrix.tensors() if tensor.is_floating_point())


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _layout(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the axes of a tensor in the order in which they lie in memory, and their sizes."""
    order = sorted(range(parameter.ndim), key=lambda axis: -int(parameter.stride()[axis]))
    return tuple(order), tuple(parameter.shape[axis] for axis in order)
