"""A convolution with a factorised weight as a chain of smaller convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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


def pointwise(
    matrix: Tensor,  # (out, in)
    count: int,
) -> Tensor:  # (out, in, 1, ...)
    """The weight of a 1 x 1 convolution over `count` spatial axes, a view."""
    return matrix.reshape(*matrix.shape, *[1] * count)
