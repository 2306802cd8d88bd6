"""The input of a convolution as rows, one for each position of its output: what its weight matrix multiplies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.models.hosts.base import Observer
from tdkit.products.convolution import Geometry
from tdkit.shapes import Shape

ROWS = 2**16  # positions from which an even sample is drawn
ELEMENTS = 2**25  # elements of the rows from which it is


def observed(
    observe: Observer,
    x: Tensor,  # (batch, in, *spatial) or (in, *spatial)
    y: Tensor,  # (batch, out, *spatial) or (out, *spatial)
    geometry: Geometry,
    padding_mode: str = "zeros",
) -> Tensor:  # as y
    """What replaces the output y of a convolution when `observe` sees its products: rows of `windows` and of y."""
    axes = len(geometry.kernel)
    batched = x.dim() == axes + 2
    with torch.no_grad():
        rows = windows(x if batched else x.unsqueeze(0), geometry, padding_mode, y.shape[-axes:])
    positions = (y if batched else y.unsqueeze(0)).flatten(2).transpose(1, 2)
    return observe(rows, positions).transpose(1, 2).reshape(y.shape)


def windows(
    x: Tensor,  # (batch, in, *spatial)
    geometry: Geometry,
    padding_mode: str,
    size: Sequence[int],
) -> Tensor:  # (batch, positions, in * kernel) or (batch, positions, groups, in / groups * kernel)
    """The part of the input that the kernel covers at each position of the output, padding included.

    A transposed convolution is the convolution of the input with zeros inserted between its values.

    Args:
        x: the input.
        geometry: of the convolution.
        padding_mode: as in ``torch.nn.Conv2d``.
        size: the output's (\\*spatial).

    Returns:
        All positions in the order of the output or, of more than `ROWS` positions or `ELEMENTS` elements, an evenly
        spread sample of them, (1, positions, ...), which is the same in every call for the same sizes.
    """
    axes = len(geometry.kernel)
    x = _spread(x, geometry, size) if geometry.transposed else _padded(x, geometry, padding_mode)
    stride = (1,) * axes if geometry.transposed else geometry.stride
    for axis in range(axes):
        step = geometry.dilation[axis]
        x = x.unfold(2 + axis, step * (geometry.kernel[axis] - 1) + 1, stride[axis])[..., ::step]
    x = x.movedim(1, 1 + axes)  # (batch, *positions, in, *kernel)
    sizes = x.shape[: 1 + axes]
    kept = min(ROWS, max(ELEMENTS // math.prod(x.shape[1 + axes :]), 1))
    if math.prod(sizes) > kept:
        x = x[torch.unravel_index(_sample(math.prod(sizes), kept).to(x.device), sizes)].unsqueeze(0)
    else:
        x = x.flatten(1, axes)
    if geometry.transposed:
        x = x.flip(tuple(range(3, 3 + axes)))
    x = x.flatten(2)
    return x if geometry.groups == 1 else x.reshape(*x.shape[:2], geometry.groups, -1)


def _padded(x: Tensor, geometry: Geometry, mode: str) -> Tensor:
    borders = geometry.borders()
    return F.pad(x, borders, mode="constant" if mode == "zeros" else mode) if any(borders) else x


def _spread(x: Tensor, geometry: Geometry, size: Sequence[int]) -> Tensor:
    """The input with zeros in between and around, over which a flipped kernel slides with a stride of 1."""
    axes = len(geometry.kernel)
    inner = [(n - 1) * stride + 1 for n, stride in zip(x.shape[2:], geometry.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *inner)
    spread[(slice(None), slice(None), *(slice(None, None, stride) for stride in geometry.stride))] = x
    borders: list[int] = []
    for axis in reversed(range(axes)):
        extent = geometry.dilation[axis] * (geometry.kernel[axis] - 1)
        before = extent - cast(Shape, geometry.padding)[axis]
        borders += [before, size[axis] + extent - inner[axis] - before]
    return F.pad(spread, borders)


def _sample(count: int, kept: int) -> Tensor:
    """Indices below `count`, one drawn at random from each of `kept` equal parts, ascending."""
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(kept, dtype=torch.float64) + torch.rand(kept, dtype=torch.float64, generator=generator)
    return (places * (count / kept)).long().clamp_max(count - 1)
