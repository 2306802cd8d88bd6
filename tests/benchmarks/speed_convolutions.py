"""Convolutions of ResNet-18 and MobileNetV2, batch 8, at half the multiply-adds: the part of speed.py about them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from tdkit import CanonicalPolyadic, Decomposition, LowRank, SpatialLowRank, Tucker
from tdkit.models.hosts.convolution import Convolution2dHost, geometry_of
from tdkit.models.preparation import prepare
from tdkit.products.convolution_cost import dense_shape, multiply_adds, shape_of
from tests.benchmarks.calls import Row, compared, filled

IMAGES = 8
SHARE = 0.5  # of the multiply-adds
COLUMNS = [
    "layer",
    "decomposition",
    "share",
    "dense_ms",
    "memory_path",
    "memory",
    "speed_path",
    "speed",
    "peak",
    "resident",
]
ROUNDS = 15


class Case(NamedTuple):
    """A convolution and the height and width of its input."""

    inner: int
    out: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        groups = ", depthwise" if self.groups > 1 else ""
        return f"{self.inner} to {self.out}, {self.kernel}x{self.kernel}{stride}{groups}, on {self.size}x{self.size}"

    def layer(self) -> nn.Conv2d:
        """The dense layer, without gradients."""
        padding = self.kernel // 2
        layer = nn.Conv2d(self.inner, self.out, self.kernel, self.stride, padding, groups=self.groups)
        return layer.requires_grad_(False).eval()


RESNET = (
    *(Case(64, 64, 56), Case(64, 128, 56, stride=2), Case(128, 128, 28), Case(128, 256, 28, stride=2)),
    *(Case(256, 256, 14), Case(256, 512, 14, stride=2), Case(512, 512, 7)),
)
POINTWISE = tuple(Case(*each, kernel=1) for each in ((144, 24, 56), (192, 32, 28), (384, 96, 14), (960, 160, 7)))
DEPTHWISE = tuple(Case(n, n, size, groups=n) for n, size in ((144, 56), (384, 14), (960, 7)))
KINDS = (LowRank(), Tucker(), SpatialLowRank(), CanonicalPolyadic())
NOT_ALIGNED = (RESNET[0], Tucker(rank_out=38, rank_in=38))  # rank_out is no multiple of 16, at the same share


def cases() -> list[tuple[Case, Decomposition]]:
    """Every layer with the decompositions that make sense for it."""
    return [
        *((case, kind) for case in RESNET for kind in KINDS),
        NOT_ALIGNED,
        *((case, LowRank()) for case in (*POINTWISE, *DEPTHWISE)),
    ]


def halved(kind: Decomposition, case: Case) -> tuple[Decomposition, float]:
    """The largest choice with at most `SHARE` of the multiply-adds, or the smallest, and its share."""
    layer = case.layer()
    shape, geometry = kind.shape_of(tuple(layer.weight.shape)), geometry_of(layer)
    whole = multiply_adds([dense_shape((case.out, layer.weight[0].numel()), geometry)], geometry)

    def share(choice: Decomposition) -> float:
        stages = choice.empty(shape, device="meta").convolutions(geometry.kernel, geometry.groups)
        assert stages is not None
        return multiply_adds([shape_of(stage) for stage in stages], geometry) / whole

    choices = kind.candidates(shape)
    found = next((choice for choice in reversed(choices) if share(choice) <= SHARE), choices[0])
    return found, share(found)


def measure(seconds: float, which: Sequence[tuple[Case, Decomposition]] | None = None) -> list[Row]:
    """The time of each case, preferring memory and preferring speed, as ratios to the dense layer's."""
    rows = []
    for case, kind in which or cases():
        dense, host, (choice, share) = case.layer(), Convolution2dHost(), halved(kind, case)
        matrix = filled(choice, choice.shape_of(tuple(dense.weight.shape))).requires_grad_(False)
        small = host.build(dense, {"weight": matrix}, {}).eval()
        fast = prepare(copy.deepcopy(small), prefer="speed")
        x = torch.randn(IMAGES, case.inner, case.size, case.size)
        calls = {"dense": partial(dense, x), "memory": partial(small, x), "speed": partial(fast, x)}
        rows.append(
            {
                "layer": str(case),
                "decomposition": choice.describe(),
                "share": share,
                "memory_path": small.path(tuple(x.shape)),
                "speed_path": fast.path(tuple(x.shape)),
                **compared(calls, fast, seconds=seconds, min_rounds=ROUNDS),
            }
        )
        print(rows[-1], flush=True)
    return rows


def half_of_3x3(rows: list[Row]) -> list[float]:
    """The ratios of low rank and Tucker on the convolutions of ResNet-18, with the ranks that a budget chooses."""
    names = {str(case) for case in RESNET}
    other = NOT_ALIGNED[1].describe()
    chosen = [row for row in rows if row["layer"] in names and row["decomposition"] != other]
    return [row["speed"] for row in chosen if row["decomposition"].startswith(("low_rank", "tucker"))]
