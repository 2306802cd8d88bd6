"""What a convolution costs, as a chain of stages and with the dense weight, in the terms of `tdkit.products.cost`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tdkit.products.convolution import Geometry, Stage, is_product
from tdkit.products.cost import CACHED, DENSE, MARGIN, Path, Product
from tdkit.shapes import Shape

CHAIN = "chain"  # the path of the stages
TRAFFIC = 2.0  # elements copied per element of an input, output or weight: oneDNN computes in layouts of its own
POINTWISE = 49  # positions of an image whose time a 1 x 1 convolution loses
HELD = 0.85  # of what a dense convolution holds that the stages may hold
RECORDED = 4 / 3  # time of a training step of a chain, which is computed twice, by that of a dense one


class StageShape(NamedTuple):
    """A `Stage` without its tensor; hashable."""

    shape: Shape
    axes: tuple[int, ...]
    groups: int
    outer: int  # values of the indices before and after the channels


def shape_of(stage: Stage) -> StageShape:
    """Returns the integers of a stage."""
    return StageShape(stage.shape, stage.axes, stage.groups, stage.leading * stage.trailing)


def dense_shape(shape: Shape, geometry: Geometry) -> StageShape:
    """Returns the dense convolution as one stage, from the shape (out, in / groups * kernel) of its matrix."""
    (out, width), kernel = shape, geometry.kernel
    return StageShape((out, width // math.prod(kernel), *kernel), tuple(range(len(kernel))), geometry.groups, 1)


def multiply_adds(stages: Sequence[StageShape], geometry: Geometry) -> int:
    """Multiply-adds of a chain for one position of its output (of its input, if transposed), away from the borders."""
    total = 0
    for number, stage in enumerate(stages):
        others = stages[:number] if geometry.transposed else stages[number + 1 :]
        # a list, which torch.compile traces
        positions = math.prod([geometry.stride[axis] for other in others for axis in other.axes])
        total += stage.outer * math.prod(stage.shape) * positions
    return total


def chain_path(stages: Sequence[StageShape], geometry: Geometry, size: Shape, *, pointwise: int = POINTWISE) -> Path:
    """The path by the stages, for an input of `size` (batch, in, *spatial); `pointwise` as `POINTWISE`."""
    batch, _, *spatial = size
    products, moved = [], 0.0
    for stage in stages:
        entering, spatial = spatial, _output_size(spatial, geometry.along(stage.axes, stage.groups))
        before, after = batch * stage.outer * math.prod(entering), batch * stage.outer * math.prod(spatial)
        out, width, *kernel = stage.shape
        positions = before if geometry.transposed else after
        if math.prod(kernel) == 1:
            positions += batch * stage.outer * pointwise
        products.append(Product(positions, width * math.prod(kernel), out // stage.groups, stage.groups))
        moved += TRAFFIC * (before * width * stage.groups + after * out + math.prod(stage.shape))
    return Path(CHAIN, tuple(products), len(stages), round(moved))


def dense_path(shape: StageShape, geometry: Geometry, size: Shape, build: Path | None) -> Path:
    """The path by the dense weight, which costs `build` in every call; nothing where it is cached."""
    path = chain_path([shape], geometry, size, pointwise=0)
    if build is None:
        return Path(CACHED, path.products, path.calls, path.moved)
    return Path(DENSE, (*path.products, *build.products), path.calls + build.calls, path.moved + build.moved)


def _output_size(size: Sequence[int], geometry: Geometry) -> list[int]:
    if geometry.padding == "same":
        return list(size)
    padding = (0,) * len(size) if isinstance(geometry.padding, str) else geometry.padding
    extents = [step * (kernel - 1) for step, kernel in zip(geometry.dilation, geometry.kernel, strict=True)]
    if geometry.transposed:
        rows = zip(size, geometry.stride, padding, extents, geometry.output_padding, strict=True)
        return [(n - 1) * stride - 2 * pad + extent + more + 1 for n, stride, pad, extent, more in rows]
    return [
        (n + 2 * pad - extent - 1) // stride + 1
        for n, stride, pad, extent in zip(size, geometry.stride, padding, extents, strict=True)
    ]


def images_at_once(stages: Sequence[StageShape], dense: StageShape, geometry: Geometry, size: Shape) -> int:
    """The most images to send through the stages at once, so that they hold about as much as a dense convolution.

    A dense convolution holds its output and copies of its input and weight. A stage with a kernel holds its input and
    output and a copy of its input in oneDNN's layout; a pointwise one makes no copy, nor does the one after it, see
    `is_product`. With more than one part, each is copied to the whole output, of whose size as much again is kept
    free: the C library does not reuse all that a part leaves.
    """
    batch, entering, *spatial = size
    first = before = batch * entering * math.prod(spatial)
    most = 0
    for number, stage in enumerate(stages):
        spatial = _output_size(spatial, geometry.along(stage.axes, stage.groups))
        after = batch * stage.outer * stage.shape[0] * math.prod(spatial)
        copies = stage.axes and not (number and is_product(*stages[number - 1][1:]))
        held = before + after + (before if copies else 0)
        most = max(most, held - first if number == 0 else held)
        before = after
    whole, allowed = before, HELD * (first + before) + math.prod(dense.shape) - sum(math.prod(s.shape) for s in stages)
    return batch if most <= allowed else max(1, round(batch * (allowed - whole) / (most + whole)))


class Choice(NamedTuple):
    """How to compute a convolution.

    Attributes:
        path: by the stages, or by the dense weight.
        images: the most of a batch to send through the stages at once, see `images_at_once`.
    """

    path: Path
    images: int


def faster_of(
    stages: Sequence[StageShape] | None,
    dense: StageShape,
    geometry: Geometry,
    size: Shape,
    build: Path,
    *,
    dtype: torch.dtype,
    device: str,
    cached: bool,
    training: bool,
) -> Choice:
    """Returns the path with the least estimated time.

    Args:
        stages: of the chain; None where there is none.
        dense: the convolution with the dense weight.
        geometry: of the convolution.
        size: of the input, (batch, in, *spatial).
        build: what it costs to build the dense weight.
        dtype: of the input.
        device: the type of the device of the input.
        cached: the dense weight may be cached.
        training: the backward pass follows, in which a chain is computed once more.
    """
    by_dense = dense_path(dense, geometry, size, None if cached else build)
    if stages is None:
        return Choice(by_dense, size[0])
    by_chain = chain_path(stages, geometry, size)
    handicap = RECORDED if training else 1 / MARGIN if cached else MARGIN  # a weight that is built takes memory
    if by_chain.seconds(dtype, device) * handicap >= by_dense.seconds(dtype, device):
        return Choice(by_dense, size[0])
    return Choice(by_chain, images_at_once(stages, dense, geometry, size))
