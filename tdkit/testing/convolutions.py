"""Chains of convolutions as plain calls of torch, to test `FactorizedMatrix.convolutions` against."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from tdkit.products.convolution import Stage


def convolution(
    x: Tensor,  # (n, groups * in, *sizes)
    weight: Tensor,  # (out, in, *kernel)
    groups: int = 1,
) -> Tensor:  # (n, out, *sizes')
    """The convolution without padding over one, two or three axes."""
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.ndim - 2]
    return function(x, weight, groups=groups)


def chain(
    x: Tensor,  # (n, channels, *sizes)
    stages: Sequence[Stage],
) -> Tensor:  # (n, out, *sizes')
    """The stages one after the other; the outer two indices of the channels are moved to the batch."""
    for stage in stages:
        n, channels, *sizes = x.shape
        middle = channels // (stage.leading * stage.trailing)
        x = x.reshape(n, stage.leading, middle, stage.trailing, *sizes).movedim(3, 2)
        y = convolution(x.reshape(-1, middle, *sizes), stage.weight, stage.groups)
        y = y.reshape(n, stage.leading, stage.trailing, *y.shape[1:]).movedim(2, 3)
        x = y.reshape(n, math.prod(y.shape[1:4]), *y.shape[4:])
    return x
