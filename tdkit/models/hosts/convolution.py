"""Convolutions and transposed convolutions of torch, and the factorised layers that replace them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.decompositions.base import FactorizedMatrix, Preference
from tdkit.models.hosts.base import FactorizedLayer, FactorizedModule, Handles, Host, Observer, Removable
from tdkit.models.hosts.sequential import PlainStages
from tdkit.models.hosts.windows import observed
from tdkit.models.lazy_weight import lazy_weight
from tdkit.products.cached_tensor import can_cache
from tdkit.products.convolution import Geometry
from tdkit.products.convolution_cost import dense_shape, multiply_adds, shape_of
from tdkit.products.recording import is_recorded
from tdkit.shapes import Shape
from tdkit.support.compatibility import (
    convolve_its_own_way,
    convolves_its_own_way,
    only_calls_forward,
    parameters_of,
    submodules_of,
)

COPIED = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding"),
    *("groups", "padding_mode"),
)


class FactorizedConvolution(FactorizedLayer):
    """A convolution with a factorised weight: a chain of smaller convolutions, or one with the dense weight.

    Replaces ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``, whose attributes it has.

    Args:
        matrix: (out_channels, in_channels / groups * kernel).
        dense: the layer that it replaces; its bias is reused.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: str
    _its_own_way: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._its_own_way = convolves_its_own_way(cls)

    def __init__(self, matrix: FactorizedMatrix, dense: nn.Module) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_parameter("bias", cast("nn.Parameter | None", dense.bias))
        for name in COPIED:
            setattr(self, name, getattr(dense, name))

    @property
    def host(self) -> str:
        return f"convolution{len(self.kernel_size)}d"

    @property
    def replaces(self) -> str:
        return f"Conv{'Transpose' if self.transposed else ''}{len(self.kernel_size)}d"

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out, in / groups, \\*kernel); of a transposed convolution (in, out, \\*kernel)."""
        out, width = self.out_channels, self.in_channels // self.groups
        size: Shape = (width, out) if self.transposed else (out, width)
        size = (*size, *self.kernel_size)
        return lazy_weight(self.matrix, size, self.as_stored, convolves=not self.transposed)

    def as_stored(
        self,
        dense: Tensor,  # (out, in / groups * kernel)
    ) -> Tensor:
        """Returns a matrix as the weight of the replaced layer."""
        return geometry_of(self).stored(dense.reshape(len(dense), -1, *self.kernel_size))

    def forward(
        self,
        input: Tensor,  # noqa: A002, the name that nn.Conv2d gives it; (batch, in, *spatial) or (in, *spatial)
    ) -> Tensor:  # (batch, out, *spatial) or (out, *spatial)
        if self._its_own_way:
            return convolve_its_own_way(self, input)
        geometry = geometry_of(self)
        if self.padding_mode == "zeros" and not is_recorded():
            matrix = cast(FactorizedMatrix, submodules_of(self)["matrix"])
            if only_calls_forward(matrix):  # the fast path of repeated calls, see `CachedTensor.again`
                weight = matrix.dispatcher.kernel(matrix, input, geometry)
                if weight is not None:
                    return geometry.convolve(input, weight, parameters_of(self)["bias"])
        return self._convolve(input, geometry)

    def _convolve(self, x: Tensor, geometry: Geometry) -> Tensor:
        axes = len(geometry.kernel)
        if self.padding_mode != "zeros":
            x = F.pad(x, geometry.borders(), mode=self.padding_mode)
            geometry = geometry.changed(padding=(0,) * axes)
        batched = x.dim() == axes + 2
        bias = cast("Tensor | None", self.bias)
        y: Tensor = submodules_of(self)["matrix"](x if batched else x.unsqueeze(0), bias, geometry)
        return y if batched else y.squeeze(0)

    def path(self, size: Shape, *, prefer: Preference | None = None) -> str:
        """The name of the path in eval mode: 'chain', 'dense' or 'dense, cached'.

        Args:
            size: of the input, (batch, in, *spatial).
            prefer: as `tdkit.prepare`; as the matrix is set when None.
        """
        matrix, geometry = self.matrix, geometry_of(self)
        if self.padding_mode != "zeros":
            size = tuple(F.pad(torch.empty(size, device="meta"), geometry.borders(), mode=self.padding_mode).shape)
            geometry = geometry.changed(padding=(0,) * len(geometry.kernel))
        cached = (prefer or matrix.prefer) == "speed" and can_cache(matrix.tensors())
        choice = matrix.dispatcher.choice(
            matrix, geometry, size, dtype=matrix.dtype, device=matrix.device.type, cached=cached
        )
        return choice.path.name

    def extra_repr(self) -> str:
        shown = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        others = {"padding": (0,) * len(self.stride), "dilation": (1,) * len(self.stride), "groups": 1}
        for name, default in {**others, "padding_mode": "zeros"}.items():
            if getattr(self, name) != default:
                shown += f", {name}={getattr(self, name)}"
        return f"{shown}, bias={self.bias is not None}"


class FactorizedTransposedConvolution(FactorizedConvolution):
    """Like `FactorizedConvolution`; replaces ``torch.nn.ConvTranspose1d``, ``2d`` and ``3d``."""

    @property
    def host(self) -> str:
        return f"transposed_convolution{len(self.kernel_size)}d"

    def forward(
        self,
        input: Tensor,  # noqa: A002, the name that nn.ConvTranspose2d gives it; (batch, in, *spatial) or (in, *spatial)
        output_size: list[int] | None = None,
    ) -> Tensor:  # (batch, out, *spatial) or (out, *spatial)
        """
        Raises:
            ValueError: when no output padding gives `output_size`, as the dense layer does.
        """
        geometry = geometry_of(self)
        if output_size is not None:
            geometry = geometry.changed(output_padding=geometry.output_padding_for(input.shape, output_size))
        return self._convolve(input, geometry)


def geometry_of(layer: nn.Module) -> Geometry:
    """Returns the geometry of a convolution of torch, or of a factorised one."""
    found: Any = layer
    return Geometry(
        tuple(found.kernel_size),  # a subclass may hold lists
        tuple(found.stride),
        found.padding if isinstance(found.padding, str) else tuple(found.padding),
        tuple(found.dilation),
        found.groups,
        found.transposed,
        tuple(found.output_padding),
    )


def image_size(layer: nn.Module, positions: int) -> Shape:
    """Returns the size (1, in, *spatial) of an image for which a convolution has about that many positions."""
    geometry = geometry_of(layer)
    side = math.ceil(positions ** (1 / len(geometry.kernel)))
    stride = (1,) * len(geometry.kernel) if geometry.transposed else geometry.stride
    least = [step * (size - 1) + 1 for step, size in zip(geometry.dilation, geometry.kernel, strict=True)]
    spatial = [max(low, side * each) for low, each in zip(least, stride, strict=True)]
    return 1, cast(int, layer.in_channels), *spatial


class ConvolutionHost(Host):
    """Host of one of ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``: weight (out, in / groups, \\*kernel)."""

    layer: ClassVar[type[nn.Module]]
    factorized = FactorizedConvolution

    def accepts(self, module: nn.Module) -> bool:
        return type(module) is self.layer

    def build(
        self, module: nn.Module, matrices: Mapping[str, FactorizedMatrix], options: Mapping[str, Any]
    ) -> FactorizedLayer:
        return self.factorized(matrices["weight"], module)

    def undo(self, layer: FactorizedModule) -> nn.Module:
        layer = cast(FactorizedConvolution, layer)
        dense = self._empty(geometry_of(layer), layer.in_channels, layer.out_channels, layer.padding_mode)
        with torch.no_grad():
            weight = layer.as_stored(layer.matrix.dense())
        dense.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        dense.register_parameter("bias", cast("nn.Parameter | None", layer.bias))
        return dense

    def sequential(self, layer: FactorizedModule, stages: PlainStages) -> nn.Sequential | None:
        layer, chain = cast(FactorizedConvolution, layer), nn.Sequential()
        geometry = geometry_of(layer)
        found = stages(layer.matrix, geometry.kernel, geometry.groups)
        if found is None:
            return None
        for number, stage in enumerate(found):
            own = geometry.along(stage.axes, stage.groups)
            plain = self._empty(own, stage.weight.shape[1] * stage.groups, stage.weight.shape[0], layer.padding_mode)
            stored = own.stored(stage.weight)
            trained = stage.weight.requires_grad
            plain.weight = stored if isinstance(stored, nn.Parameter) else nn.Parameter(stored.contiguous(), trained)
            last = number == len(found) - 1
            plain.register_parameter("bias", cast("nn.Parameter | None", layer.bias if last else None))
            chain.append(plain)
        return chain

    def _empty(self, geometry: Geometry, width: int, out: int, padding_mode: str) -> nn.Module:
        """A layer of torch whose weight, on the meta device, and bias are still to be set."""
        more = {"output_padding": geometry.output_padding} if geometry.transposed else {}
        return self.layer(
            width,
            out,
            geometry.kernel,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            padding_mode=padding_mode,
            bias=False,
            device="meta",
            **more,
        )

    def computed(self, module: nn.Module, weight: str) -> str:
        return "dense" if convolves_its_own_way(type(module)) else super().computed(module, weight)

    def multiply_adds(self, module: nn.Module, weight: str, matrix: FactorizedMatrix) -> int:
        """Returns the multiply-adds for one position: of the stages, or of the dense weight where it needs fewer."""
        geometry = geometry_of(module)
        dense = multiply_adds([dense_shape(matrix.shape, geometry)], geometry)
        stages = matrix.convolutions(geometry.kernel, geometry.groups)
        return dense if stages is None else min(dense, multiply_adds([shape_of(stage) for stage in stages], geometry))

    def path(self, module: nn.Module, weight: str, matrix: FactorizedMatrix, tokens: int) -> str:
        size = image_size(module, tokens)
        choice = matrix.dispatcher.choice(
            matrix, geometry_of(module), size, dtype=torch.float32, device="cpu", cached=False
        )
        return choice.path.name

    def attach(self, module: nn.Module, weight: str, observe: Observer) -> Removable:
        """As `Host.attach`, with a row for each position of each image.

        x is (batch, positions, in / groups * kernel), the part of the input that the kernel covers at each output
        position, or (batch, positions, groups, in / groups * kernel) for several groups; y is (batch, positions,
        out). x of very many positions has evenly spread ones only, see `tdkit.models.hosts.windows`, and the rows
        of y then do not correspond to it. Nothing is seen of a subclass that convolves with another weight.
        """
        if convolves_its_own_way(type(module)):
            return Handles()

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = cast(Tensor, args[0] if args else kwargs["input"])
            return observed(observe, x, y, geometry_of(layer), cast(str, layer.padding_mode))

        return module.register_forward_hook(hook, with_kwargs=True)


class TransposedConvolutionHost(ConvolutionHost):
    """Host of one of ``torch.nn.ConvTranspose1d``, ``2d`` and ``3d`` with one group: weight (in, out, \\*kernel)."""

    factorized = FactorizedTransposedConvolution

    def refusal(self, module: nn.Module, weight: str) -> str | None:
        groups = cast(nn.ConvTranspose2d, module).groups
        if groups > 1:
            return f"{type(module).__name__} with groups={groups} has no view (out, in / groups, *kernel)"
        return None

    def canonical(self, stored: Tensor, weight: str) -> Tensor:
        return stored.transpose(0, 1)

    def stored(self, canonical: Tensor, weight: str) -> Tensor:
        return canonical.transpose(0, 1).contiguous()


class Convolution1dHost(ConvolutionHost):
    name, layer = "convolution1d", nn.Conv1d


class Convolution2dHost(ConvolutionHost):
    name, layer = "convolution2d", nn.Conv2d


class Convolution3dHost(ConvolutionHost):
    name, layer = "convolution3d", nn.Conv3d


class TransposedConvolution1dHost(TransposedConvolutionHost):
    name, layer = "transposed_convolution1d", nn.ConvTranspose1d


class TransposedConvolution2dHost(TransposedConvolutionHost):
    name, layer = "transposed_convolution2d", nn.ConvTranspose2d


class TransposedConvolution3dHost(TransposedConvolutionHost):
    name, layer = "transposed_convolution3d", nn.ConvTranspose3d
