"""Which path each product of a matrix takes, and the dense weight that is cached where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tdkit.errors import TdkitError
from tdkit.products import kernels, onednn
from tdkit.products.autograd import autocast_dtype, has_autocast, without_autocast
from tdkit.products.cached_tensor import CachedTensor, can_cache
from tdkit.products.convolution import Geometry, Stage, chain, merged
from tdkit.products.convolution_cost import CHAIN, Choice, dense_shape, faster_of, multiply_adds, shape_of
from tdkit.products.cost import (
    CACHED,
    DENSE,
    FEW,
    FUSED,
    GRAPH,
    Path,
    PathTable,
    Product,
    cached_path,
    lookup,
    path_table,
)
from tdkit.products.recording import is_for_all_sizes, is_recorded
from tdkit.products.structure import Structure
from tdkit.shapes import Shape
from tdkit.support.compatibility import constant_for_compile, in_transform

WHOLE = "whole"  # what `CachedTensor.again` is asked for by `Dispatcher.stored`, whatever the input
CHOICES = 256  # sizes of images for which the path is remembered

Preference = Literal["speed", "auto", "memory"]


class Factorized(Protocol):
    """What a dispatcher asks of a matrix (out, in)."""

    shape: Shape
    training: bool

    @property
    def structure(self) -> Structure | None: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def dense(self) -> Tensor: ...

    def tensors(self) -> Sequence[Tensor]: ...

    def paths(self, tokens: int) -> tuple[Path, ...]: ...

    def multiply(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor: ...

    def convolutions(self, kernel: tuple[int, ...], groups: int) -> list[Stage] | None: ...


class Dispatcher:
    """Takes the cheapest path for each product of one matrix. The matrix owns it and passes itself to every call.

    Attributes:
        prefer: what may be cached in eval mode: nothing with 'memory'; with 'auto' the dense weight where the layer
            does not multiply by the factors; with 'speed' also where the dense weight is faster than the factors.
        graphs: whether a CUDA graph replays the calls, where a launch costs little.
    """

    def __init__(self) -> None:
        self.prefer: Preference = "auto"
        self.graphs = False
        self._weight = CachedTensor()
        self._stored = CachedTensor()  # the dense weight in the layout of the layer
        self._caches = [self._weight, self._stored]
        self._tables: dict[tuple[object, ...], PathTable] = {}
        self._choices: dict[tuple[object, ...], Choice] = {}

    def configure(self, prefer: Preference, *, graphs: bool = False) -> None:
        """Set `prefer` and `graphs` and empty the cache."""
        self.prefer, self.graphs = prefer, graphs
        self.clear()

    def linear(
        self,
        matrix: Factorized,
        x: Tensor,  # (*batch, in)
        bias: Tensor | None,  # (out,)
    ) -> Tensor:  # (*batch, out)
        """``x @ dense().T + bias`` by the cheapest path for the size, dtype and device of x."""
        if is_recorded():
            return matrix.multiply(x, bias, _recorded_path(matrix, x))
        may_cache = self.prefer == "speed" and not matrix.training
        tensors = matrix.tensors()
        weight = self._weight.again((x.numel(), x.dtype), tensors) if may_cache else None
        if weight is None:
            return self._dispatch(matrix, x, bias, tensors, may_cache)
        return onednn.linear(x, weight, bias)

    def _dispatch(
        self, matrix: Factorized, x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], may_cache: bool
    ) -> Tensor:
        check_loaded(tensors, x)
        tokens, device = x.numel() // matrix.shape[1], x.device.type
        training = _needs_gradients(tensors)
        if may_cache and not training and not in_transform():
            path = lookup(self.table(matrix, x.dtype, device, cached=True), tokens)
            if path.name != CACHED:
                return matrix.multiply(x, bias, path)
            few = tokens <= FEW and device == "cpu" and not onednn.serves(x, matrix.shape)
            autocast, call = _call_on(device, x.numel(), x.dtype)
            dtype = autocast or x.dtype
            weight = self._weight.get(tensors, dtype, matrix.dense, few=few, call=call, device=device)
            if weight is not None:
                return onednn.linear(x, weight, bias)
        table = self.table(matrix, x.dtype, device, cached=False, training=training)
        return matrix.multiply(x, bias, lookup(table, tokens))

    def path(
        self, matrix: Factorized, tokens: int, *, prefer: Preference | None, dtype: torch.dtype, device: str
    ) -> Path:
        """The path of `linear` in eval mode without gradients; `prefer` as it is set when None."""
        cached = (prefer or self.prefer) == "speed" and can_cache(matrix.tensors())
        name = lookup(self.table(matrix, dtype, device, cached=cached), tokens).name
        every = (*matrix.paths(tokens), cached_path(tokens, matrix.shape))
        return next(path for path in every if path.name == name)

    def table(
        self, matrix: Factorized, dtype: torch.dtype, device: str, *, cached: bool, training: bool = False
    ) -> PathTable:
        """The cheapest path for every number of tokens, with the backward pass included in training."""
        device = GRAPH if self.graphs and device == "cuda" else device
        key = (dtype, device, cached, training)
        found = self._tables.get(key)
        if found is None:
            with_kernels = not training and kernels.offered(dtype, device)
            found = self._tables[key] = path_table(
                lambda tokens: tuple(p for p in matrix.paths(tokens) if with_kernels or p.name != FUSED),
                matrix.shape,
                dtype=dtype,
                device=device,
                threads=torch.get_num_threads(),
                cached=cached,
                training=training,
            )
        return found

    def convolution(
        self,
        matrix: Factorized,
        x: Tensor,  # (batch, in, *spatial)
        bias: Tensor | None,  # (out,)
        geometry: Geometry,
    ) -> Tensor:  # (batch, out, *spatial)
        """The convolution with the weight that is the matrix, by its stages or by the dense weight."""
        if is_recorded() or in_transform():
            stages = _stages(matrix, geometry)
            if stages is not None and _needs_fewer(stages, matrix.shape, geometry):
                return chain(x, stages, bias, geometry)
            return geometry.convolve(x, _kernel_of(matrix, geometry), bias)
        weight = self.kernel(matrix, x, geometry)
        if weight is not None:
            return geometry.convolve(x, weight, bias)
        tensors = matrix.tensors()
        may_cache = self.prefer == "speed" and not matrix.training
        check_loaded(tensors, x)
        training = _needs_gradients(tensors)
        cached = may_cache and not training
        choice_of = partial(
            self.choice, matrix, geometry, tuple(x.shape), dtype=x.dtype, device=x.device.type, training=training
        )
        choice = choice_of(cached=cached)
        if cached and choice.path.name != CHAIN:
            device = x.device.type
            autocast, call = _call_on(device, x.shape, x.dtype, geometry)
            build = partial(_kernel_of, matrix, geometry)
            weight = self._stored.get(tensors, autocast or x.dtype, build, call=call, device=device)
            if weight is not None:
                return geometry.convolve(x, weight, bias)
            choice = choice_of(cached=False)
        if choice.path.name != CHAIN:
            return geometry.convolve(x, _kernel_of(matrix, geometry), bias)
        stages = _stages(matrix, geometry)
        assert stages is not None
        return chain(x, stages, bias, geometry, images=choice.images)

    def kernel(self, matrix: Factorized, x: Tensor, geometry: Geometry) -> Tensor | None:
        """The dense weight that answered an earlier call of `convolution` like this one, None where none did."""
        if self.prefer != "speed" or matrix.training:
            return None
        return self._stored.again((x.shape, x.dtype, geometry), matrix.tensors())

    def choice(
        self,
        matrix: Factorized,
        geometry: Geometry,
        size: Shape,
        *,
        dtype: torch.dtype,
        device: str,
        cached: bool,
        training: bool = False,
    ) -> Choice:
        """How `convolution` computes for an input of `size` (batch, in, *spatial)."""
        device = GRAPH if self.graphs and device == "cuda" else device
        key = (geometry, size, dtype, device, cached, training)
        found = self._choices.get(key)
        if found is None:
            stages = _stages(matrix, geometry)
            if len(self._choices) >= CHOICES:  # images of ever new sizes
                self._choices.clear()
            found = self._choices[key] = faster_of(
                None if stages is None else [shape_of(stage) for stage in stages],
                dense_shape(matrix.shape, geometry),
                geometry,
                size,
                _build_path(matrix),
                dtype=dtype,
                device=device,
                cached=cached,
                training=training,
            )
        return found

    def may_cache(self, matrix: Factorized) -> bool:
        """Whether a product may cache what it computes from the factors: it is wanted, in eval mode, no gradients."""
        if self.prefer != "speed" or matrix.training or is_recorded() or in_transform():
            return False
        return not (torch.is_grad_enabled() and _needs_gradients(matrix.tensors()))

    def new_cache(self) -> CachedTensor:
        """A cache for something else than the dense weight, emptied and counted together with it."""
        self._caches.append(CachedTensor())
        return self._caches[-1]

    def dense(self, matrix: Factorized) -> Tensor:  # (out, in)
        """The dense weight, for what computes with it: from the cache where one is allowed, see `prefer`."""
        weight = self.cached_weight(matrix)
        return matrix.dense() if weight is None else weight

    def cached_weight(self, matrix: Factorized) -> Tensor | None:  # (out, in)
        """The dense weight, in the cache from now on; None where it may not be cached. It must not be written to."""
        return self._kept(matrix, self._weight, None)

    def stored(
        self,
        matrix: Factorized,
        layout: Callable[[Tensor], Tensor],  # of the matrix (out, in) to the weight of the layer
    ) -> Tensor:
        """Like `dense`, in the layout of the layer, which is that of all layers that share the matrix."""
        weight = None if is_recorded() else self.stored_again(matrix)
        if weight is None:
            weight = self._kept(matrix, self._stored, layout)
        return layout(matrix.dense()) if weight is None else weight

    def stored_again(self, matrix: Factorized) -> Tensor | None:
        """What an earlier call of `stored` took from the cache, None where none did."""
        if self.prefer == "memory" or matrix.training:
            return None
        return self._stored.again(WHOLE, matrix.tensors())

    def _kept(
        self, matrix: Factorized, cache: CachedTensor, layout: Callable[[Tensor], Tensor] | None
    ) -> Tensor | None:
        if self.prefer == "memory" or matrix.training or is_recorded() or in_transform():
            return None
        tensors = matrix.tensors()
        if _needs_gradients(tensors):
            return None
        dtype, device = matrix.dtype, matrix.device.type
        weight = cache.find(tensors, dtype)
        if weight is not None or device == "meta":
            return weight
        build = matrix.dense if layout is None else lambda: layout(matrix.dense())
        call = None if layout is None else WHOLE
        with without_autocast(device):
            return cache.get(tensors, dtype, build, call=call, device=device)

    def clear(self) -> None:
        """Empty the cache."""
        for cache in self._caches:
            cache.clear()

    @property
    def cached_bytes(self) -> int:
        """Bytes in the cache at the moment."""
        return sum(cache.bytes for cache in self._caches)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tables": {}, "_choices": {}}


def check_loaded(tensors: Sequence[Tensor], x: Tensor) -> None:
    """Refuse to compute with tensors that have no numbers.

    Raises:
        TdkitError: when one of them is on the meta device and x is not.
    """
    if tensors[0].is_meta and not x.is_meta:
        raise TdkitError(
            "the factors are on the meta device and hold no numbers: what offloaded them does not load them before "
            "the matrix is called. Hooks on each module do, as accelerate attaches them; or keep the factorised "
            "layers in memory"
        )


def _call_on(device: str, *key: Hashable) -> tuple[torch.dtype | None, Hashable]:
    """The dtype of autocast, None where it is off, and `key` where `CachedTensor.again` may answer such calls."""
    autocast = autocast_dtype(device)
    return autocast, key if autocast is None and has_autocast(device) else None


def _needs_gradients(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _build_path(matrix: Factorized) -> Path:
    """What the dense weight costs; without a structure, as much as that of a low-rank pair of the same size."""
    if matrix.structure is not None:
        return matrix.structure.build_path()
    (out, width), params = matrix.shape, sum(tensor.numel() for tensor in matrix.tensors())
    return Path(DENSE, (Product(out, -(-params // (out + width)), width),))


def _stages(matrix: Factorized, geometry: Geometry) -> list[Stage] | None:
    stages = matrix.convolutions(geometry.kernel, geometry.groups)
    return None if stages is None else merged(stages)


def _kernel_of(matrix: Factorized, geometry: Geometry) -> Tensor:
    """The dense weight as torch takes it."""
    return geometry.stored(matrix.dense().reshape(matrix.shape[0], -1, *geometry.kernel))


def _needs_fewer(stages: Sequence[Stage], shape: Shape, geometry: Geometry) -> bool:
    """Whether the stages need fewer multiply-adds than the dense weight; by sizes that torch.compile knows."""
    dense = [dense_shape(shape, geometry)]
    return multiply_adds([shape_of(stage) for stage in stages], geometry) < multiply_adds(dense, geometry)


def _recorded_path(matrix: Factorized, x: Tensor) -> Path:
    """The path in a recorded program: without cache and kernels, and no arithmetic on shapes in the graph."""
    structure = matrix.structure
    if structure is None:
        return matrix.paths(1)[0]
    kind, fields = type(structure), structure.fields
    if is_for_all_sizes():
        return _constant_path(kind, fields)
    table = _constant_table(kind, fields, x.dtype, x.device.type, torch.is_grad_enabled())
    return lookup(table, x.numel() // matrix.shape[1])


@constant_for_compile
def _constant_path(kind: type[Structure], fields: tuple[Any, ...]) -> Path:
    return kind(*fields).recorded_path()


@constant_for_compile
def _constant_table(
    kind: type[Structure], fields: tuple[Any, ...], dtype: torch.dtype, device: str, training: bool
) -> PathTable:
    structure = kind(*fields)
    return path_table(
        lambda tokens: tuple(path for path in structure.paths(tokens) if path.name != FUSED),
        structure.shape,
        dtype=dtype,
        device=device,
        threads=torch.get_num_threads(),
        cached=False,
        training=training,
    )
