"""A convolution with a factorised weight as a chain of smaller convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.products import onednn
from tdkit.products.autograd import autocast_dtype
from tdkit.products.recording import is_recorded, needs_plain_operations
from tdkit.shapes import Shape
from tdkit.support.compatibility import static_shape

FUNCTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class Stage:
    """One convolution of a chain.

    The channels of its input are (leading, in, trailing) and those of its output (leading, out, trailing), flattened:
    the convolution acts on the middle index, with the same weight for each value of the outer two.

    Attributes:
        weight: (out, in / groups, *kernel), with a kernel size of 1 along every axis that is not in `axes`.
        axes: the spatial axes, counted from 0, along which the kernel extends. The stride, padding and dilation of
            the layer apply along these; the stages of a chain divide all axes among them.
        groups: as in ``torch.nn.Conv2d``, of the middle index.
        leading: number of values of the index before the channels.
        trailing: number of values of the index after the channels.
    """

    weight: Tensor
    axes: tuple[int, ...] = ()
    groups: int = 1
    leading: int = 1
    trailing: int = 1

    @property
    def shape(self) -> Shape:
        """The shape of the weight, as integers also where torch.jit.trace runs."""
        return static_shape(self.weight)

    @property
    def outer(self) -> tuple[int, int]:
        """Numbers of values of the indices before and after the channels."""
        return self.leading, self.trailing


def pointwise(
    matrix: Tensor,  # (out, in)
    count: int,
) -> Tensor:  # (out, in, 1, ...)
    """The weight of a 1 x 1 convolution over `count` spatial axes, a view."""
    return matrix.reshape(*matrix.shape, *[1] * count)


def merged(stages: Sequence[Stage]) -> list[Stage]:
    """The same chain with depthwise stages that follow each other, along different axes, as one: fewer passes."""
    found: list[Stage] = []
    for stage in stages:
        last = found[-1] if found else None
        if last is not None and _is_depthwise(last) and _is_depthwise(stage) and last.outer == stage.outer:
            found.pop()
            weight = last.weight * stage.weight  # of different axes: the outer product of their kernels
            stage = Stage(weight, last.axes + stage.axes, stage.groups, stage.leading, stage.trailing)
        found.append(stage)
    return found


def _is_depthwise(stage: Stage) -> bool:
    return stage.shape[0] == stage.groups > 1 and stage.shape[1] == 1


class Geometry(NamedTuple):
    """The arguments of a convolution besides its input, weight and bias, as in ``torch.nn.Conv2d``.

    Attributes:
        kernel: the kernel sizes.
        stride: of each axis.
        padding: of each axis, with zeros; or 'same' or 'valid'.
        dilation: of each axis.
        groups: the groups of channels.
        transposed: whether it is a transposed convolution.
        output_padding: of each axis, of a transposed convolution.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of_call(
        cls,
        kernel: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Geometry:
        """That of ``torch.nn.functional.conv2d`` and the like with these arguments."""

        def sizes(given: int | Sequence[int]) -> tuple[int, ...]:
            given = (given,) if isinstance(given, int) else tuple(given)
            return given * len(kernel) if len(given) == 1 else given

        pads = padding if isinstance(padding, str) else sizes(padding)
        return cls(tuple(kernel), sizes(stride), pads, sizes(dilation), groups)

    def changed(self, **parts: Any) -> Geometry:
        """Like ``_replace``, which torch.compile did not trace before torch 2.9."""
        return Geometry(*[parts.get(name, value) for name, value in zip(Geometry._fields, self, strict=True)])

    def along(self, axes: Sequence[int], groups: int) -> Geometry:
        """The geometry of a stage that extends along `axes`."""

        def kept(sizes: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(size if axis in axes else other for axis, size in enumerate(sizes))

        padding = self.padding if isinstance(self.padding, str) else kept(self.padding, 0)
        kernel, stride, dilation = kept(self.kernel, 1), kept(self.stride, 1), kept(self.dilation, 1)
        return Geometry(kernel, stride, padding, dilation, groups, self.transposed, kept(self.output_padding, 0))

    def borders(self) -> list[int]:
        """Returns the padding before and after each axis, the last axis first, as ``torch.nn.functional.pad`` takes it.

        For 'same' the larger half of an odd number comes after.
        """
        if self.padding == "valid":
            return [0, 0] * len(self.kernel)
        if isinstance(self.padding, str):
            totals = [step * (size - 1) for step, size in zip(self.dilation, self.kernel, strict=True)]
            return [border for total in reversed(totals) for border in (total // 2, total - total // 2)]
        return [border for size in reversed(self.padding) for border in (size, size)]

    def output_padding_for(
        self,
        size: Sequence[int],  # of the input, (batch, in, *spatial) or (in, *spatial)
        wanted: Sequence[int],  # of the output, (*spatial) or with the sizes before them
    ) -> tuple[int, ...]:
        """The output padding with which a transposed convolution has an output of the size that is wanted.

        Raises:
            ValueError: when there is none.
        """
        axes, padding = len(self.kernel), cast(Shape, self.padding)
        if len(wanted) not in (axes, len(size)):
            raise ValueError(f"output_size={list(wanted)} must have {axes} or {len(size)} elements")
        least = [
            (n - 1) * stride - 2 * pad + step * (kernel - 1) + 1
            for n, stride, pad, step, kernel in zip(
                size[-axes:], self.stride, padding, self.dilation, self.kernel, strict=True
            )
        ]
        missing = tuple(w - n for w, n in zip(wanted[-axes:], least, strict=True))
        if any(not 0 <= more < stride for more, stride in zip(missing, self.stride, strict=True)):
            most = [n + stride - 1 for n, stride in zip(least, self.stride, strict=True)]
            raise ValueError(f"output_size={list(wanted[-axes:])} must be from {least} to {most} for this input")
        return missing

    def stored(
        self,
        weight: Tensor,  # (out, in / groups, *kernel)
    ) -> Tensor:
        """Returns a weight in the layout of torch: for a transposed convolution (in, out / groups, *kernel)."""
        if not self.transposed:
            return weight
        out, width = weight.shape[0], weight.shape[1] * self.groups
        by_group = weight.reshape(self.groups, out // self.groups, -1, *self.kernel)
        return by_group.transpose(1, 2).reshape(width, out // self.groups, *self.kernel)

    def convolve(
        self,
        x: Tensor,  # (batch, in, *spatial)
        weight: Tensor,  # as `stored`
        bias: Tensor | None,  # (out,)
    ) -> Tensor:  # (batch, out, *spatial)
        """The convolution by one call of torch."""
        number = len(self.kernel) - 1
        if self.transposed:
            return TRANSPOSED[number](
                x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        return FUNCTIONS[number](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def chain(
    x: Tensor,  # (batch, in, *spatial)
    stages: Sequence[Stage],
    bias: Tensor | None,  # (out,)
    geometry: Geometry,
    *,
    images: int | None = None,
) -> Tensor:  # (batch, out, *spatial)
    """The convolution by its stages, one after the other; without gradients, by `images` of the batch at once.

    Only x and the weights of the stages are saved for the backward pass, which computes the results in between again.
    Under autocast the operands are cast as the convolutions of torch cast their own.
    """
    weights = [stage.weight for stage in stages]
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weights, bias = x.to(dtype), [w.to(dtype) for w in weights], None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _recorded(x, bias, weights, stages, geometry, images)
    return _recorded(x, bias, weights, stages, geometry, images)


def _recorded(
    x: Tensor,
    bias: Tensor | None,
    weights: Sequence[Tensor],
    stages: Sequence[Stage],
    geometry: Geometry,
    images: int | None,
) -> Tensor:
    traced = is_recorded() or needs_plain_operations()
    operands = [x, *weights, *([] if bias is None else [bias])]
    if traced:
        return _run(x, bias, weights, stages, geometry)
    if not torch.is_grad_enabled() or not any(operand.requires_grad for operand in operands):
        return _in_parts(x, bias, weights, stages, geometry, len(x) if images is None else images)
    shapes = tuple(Stage(torch.empty(0), s.axes, s.groups, s.leading, s.trailing) for s in stages)
    y: Tensor = Chain.apply(shapes, geometry, x, bias, *weights)  # type: ignore[no-untyped-call]
    return y


def _in_parts(
    x: Tensor, bias: Tensor | None, weights: Sequence[Tensor], stages: Sequence[Stage], geometry: Geometry, images: int
) -> Tensor:
    if images >= len(x):
        return _run(x, bias, weights, stages, geometry)
    whole: Tensor | None = None
    for start in range(0, len(x), images):
        part = _run(x[start : start + images], bias, weights, stages, geometry)
        if whole is None:
            whole = part.new_empty(len(x), *part.shape[1:])
        whole[start : start + images] = part
        del part  # its memory serves the next one
    assert whole is not None
    return whole


class Chain(torch.autograd.Function):
    """A chain of convolutions that saves its input and weights only; its backward pass can be differentiated itself."""

    @staticmethod
    def forward(
        stages: Sequence[Stage], geometry: Geometry, x: Tensor, bias: Tensor | None, *weights: Tensor
    ) -> Tensor:
        y = _run(x, bias, weights, stages, geometry)
        storage, place = y.untyped_storage(), y.storage_offset()
        return y.new_empty(0).set_(storage, place, y.size(), y.stride())  # no view, so that it can be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.stages, ctx.geometry, x, bias, *weights = inputs
        ctx.save_for_backward(x, bias, *weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        operands: list[Tensor | None] = list(ctx.saved_tensors)
        needed = ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # the backward pass is itself recorded
        if not again:
            operands = [
                None if operand is None else operand.detach().requires_grad_(needs)
                for operand, needs in zip(operands, needed, strict=True)
            ]
        x, bias, *weights = operands
        with torch.enable_grad():
            y = _run(x, bias, weights, ctx.stages, ctx.geometry)  # type: ignore[arg-type]
        wanted = [operand for operand, needs in zip(operands, needed, strict=True) if needs]
        found = iter(torch.autograd.grad(y, wanted, gradients, create_graph=again))  # type: ignore[arg-type]
        return None, None, *(next(found) if needs else None for needs in needed)


def _run(
    x: Tensor, bias: Tensor | None, weights: Sequence[Tensor], stages: Sequence[Stage], geometry: Geometry
) -> Tensor:
    plain = is_recorded() or needs_plain_operations() or x.device.type != "cpu"
    needs_gradients = torch.is_grad_enabled() and any(operand.requires_grad for operand in (x, *weights))
    multiplies = not (plain or needs_gradients)
    channels_last = multiplies and _is_channels_last(x)
    for number, (weight, stage) in enumerate(zip(weights, stages, strict=True)):
        own, is_last = geometry.along(stage.axes, stage.groups), number == len(stages) - 1
        own_bias = bias if is_last else None
        if multiplies and is_product(stage.axes, stage.groups, stage.leading * stage.trailing):
            x = _multiply(x, weight.flatten(1), own_bias, channels_last=channels_last if is_last else x.dim() > 3)
        else:
            x = _convolve_middle(x, weight, own_bias, stage, own)
    return x


def is_product(axes: Sequence[int], groups: int, outer: int) -> bool:
    """Whether a stage is the product of each position with one matrix, which a CPU computes as such.

    A stage with a kernel after it then reads its input with the channels last, of which oneDNN makes no copies, and
    whose number it does not pad to whole registers.
    """
    return not axes and groups == outer == 1


def _multiply(
    x: Tensor,  # (batch, in, *spatial)
    matrix: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    *,
    channels_last: bool,
) -> Tensor:  # (batch, out, *spatial), in memory (batch, *spatial, out) if channels_last
    columns, batch = x.flatten(2), len(x)
    if not channels_last:
        every = matrix.expand(batch, -1, -1)
        y = torch.bmm(every, columns) if bias is None else torch.baddbmm(bias[:, None], every, columns)
        return y.view(batch, len(matrix), *x.shape[2:])
    rows = columns.mT
    if rows.is_contiguous():
        y = onednn.linear(rows, matrix, bias)
    else:
        every = matrix.T.expand(batch, -1, -1)
        y = torch.bmm(rows, every) if bias is None else torch.baddbmm(bias, rows, every)
    return y.mT.view(batch, len(matrix), *x.shape[2:])


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() > 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _convolve_middle(x: Tensor, weight: Tensor, bias: Tensor | None, stage: Stage, geometry: Geometry) -> Tensor:
    """One stage: leading values are folded into the batch, trailing ones into the batch or the positions."""
    leading, trailing, stored = stage.leading, stage.trailing, geometry.stored(weight)
    if leading == trailing == 1:
        return geometry.convolve(x, stored, bias)
    batch, spatial = x.shape[0], x.shape[2:]
    x = x.reshape(batch * leading, -1, trailing, *spatial)
    if not stage.axes:
        y = F.conv1d(x.flatten(2), weight.flatten(1).unsqueeze(2), groups=stage.groups)
        y = y.reshape(batch, -1, *spatial)
    else:
        x = x.movedim(2, 1).flatten(0, 1)
        y = geometry.convolve(x, stored, None)
        y = y.view(batch * leading, trailing, *y.shape[1:]).movedim(1, 2).reshape(batch, -1, *y.shape[2:])
    return y if bias is None else y + bias.view(-1, *(1 for _ in spatial))
