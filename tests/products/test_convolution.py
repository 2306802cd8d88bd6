"""A chain of stages equals the convolution with the product of their weights, and the faster way is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tdkit.evaluation.timing import peak_bytes, saved_bytes
from tdkit.products.convolution import Geometry, Stage, chain, merged
from tdkit.products.convolution_cost import CHAIN, chain_path, dense_shape, faster_of, multiply_adds, shape_of
from tdkit.products.cost import CACHED, DENSE, Path

PLAIN = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
GEOMETRIES = {
    "plain": PLAIN,
    "strided": PLAIN._replace(stride=(2, 3), padding=(0, 2)),
    "dilated": PLAIN._replace(dilation=(2, 1)),
    "same": PLAIN._replace(padding="same", dilation=(1, 2)),
    "valid": PLAIN._replace(padding="valid", stride=(1, 2)),
    "transposed": PLAIN._replace(transposed=True, stride=(2, 1), dilation=(1, 2), output_padding=(1, 0)),
}


def random(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def full(stage: Stage) -> Tensor:
    """The weight of a stage over all channels, (leading * out * trailing, leading * in * trailing, *kernel)."""
    out, width, *kernel = stage.weight.shape
    blocks = stage.weight.reshape(stage.groups, out // stage.groups, width, -1).unbind(0)
    flat = [torch.block_diag(*(block[..., k] for block in blocks)) for k in range(math.prod(kernel))]
    eyes = torch.eye(stage.leading, dtype=torch.float64), torch.eye(stage.trailing, dtype=torch.float64)
    every = [torch.kron(torch.kron(eyes[0], matrix), eyes[1]) for matrix in flat]
    return torch.stack(every, -1).reshape(*every[0].shape, *kernel)


def composed(stages: Sequence[Stage]) -> Tensor:
    """The weight (out, in, *kernel) of the whole chain."""
    weight = full(stages[0])
    for stage in stages[1:]:
        after = full(stage)
        # kernels of different axes: a product over the channels and an outer product over the positions
        weight = torch.einsum("orab,ricd->oiacbd", after, weight).reshape(
            after.shape[0], weight.shape[1], after.shape[2] * weight.shape[2], after.shape[3] * weight.shape[3]
        )
    return weight


CHAINS: dict[str, list[Stage]] = {
    "low rank": [Stage(random(2, 4, 3, 3), (0, 1)), Stage(random(6, 2, 1, 1))],
    "tucker": [Stage(random(3, 4, 1, 1)), Stage(random(5, 3, 3, 3), (0, 1)), Stage(random(6, 5, 1, 1))],
    "cp": [
        Stage(random(5, 4, 1, 1)),
        Stage(random(5, 1, 3, 1), (0,), groups=5),
        Stage(random(5, 1, 1, 3), (1,), groups=5),
        Stage(random(6, 5, 1, 1)),
    ],
    "spatial": [Stage(random(3, 4, 3, 1), (0,)), Stage(random(6, 3, 1, 3), (1,))],
    "spatial, the second axis first": [Stage(random(3, 4, 1, 3), (1,)), Stage(random(6, 3, 3, 1), (0,))],
    "kronecker": [Stage(random(3, 2, 3, 3), (0, 1), leading=2), Stage(random(2, 2, 1, 1), trailing=3)],
    "kronecker, kernels in both": [
        Stage(random(3, 2, 1, 3), (1,), leading=2),
        Stage(random(2, 2, 3, 1), (0,), trailing=3),
    ],
    "one stage, trailing": [Stage(random(3, 2, 3, 3), (0, 1), trailing=2)],
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("stages", CHAINS.values(), ids=CHAINS)
def test_a_chain_equals_the_dense_convolution(stages: list[Stage], geometry: Geometry) -> None:
    weight = composed(stages)
    x, bias = random(2, 4, 9, 11), random(6)
    expected = geometry.convolve(x, geometry.stored(weight), bias)
    torch.testing.assert_close(chain(x, stages, bias, geometry), expected)
    torch.testing.assert_close(chain(x, stages, bias, geometry, images=1), expected)
    spread = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(chain(spread, stages, bias, geometry), expected)
    torch.testing.assert_close(chain(x, merged(stages), bias, geometry), expected)


@pytest.mark.parametrize("name", ["low rank", "tucker", "cp"])
@pytest.mark.parametrize("geometry", [GEOMETRIES["strided"], GEOMETRIES["transposed"]], ids=["strided", "transposed"])
def test_the_output_lies_in_memory_as_the_input(name: str, geometry: Geometry) -> None:
    x = random(2, 4, 9, 11)
    for bias in (random(6), None):
        y = chain(x, CHAINS[name], bias, geometry)
        assert y.is_contiguous()
        spread = chain(x.contiguous(memory_format=torch.channels_last), CHAINS[name], bias, geometry)
        assert spread.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(spread.contiguous(), y)


@pytest.mark.parametrize("axes", [1, 3])
def test_pointwise_stages_are_products_of_any_number_of_axes(axes: int) -> None:
    kernel = (3,) * axes
    sizes = [random(3, 4, *(1,) * axes), random(5, 3, *kernel), random(6, 5, *(1,) * axes)]
    stages = [Stage(sizes[0]), Stage(sizes[1], tuple(range(axes))), Stage(sizes[2])]
    geometry = Geometry(kernel, (2,) * axes, (1,) * axes, (1,) * axes)
    x, bias = random(2, 4, *(7,) * axes), random(6)
    weight = torch.einsum("op,pq...,qi->oi...", sizes[2].flatten(1), sizes[1], sizes[0].flatten(1))
    y = chain(x, stages, bias, geometry)
    torch.testing.assert_close(y, geometry.convolve(x, weight, bias))
    assert y.is_contiguous()
    recorded = [Stage(stage.weight.detach().requires_grad_(), stage.axes) for stage in stages]
    torch.testing.assert_close(chain(x, recorded, bias, geometry), y)


def test_a_kernel_reads_what_a_product_wrote_with_the_channels_last() -> None:
    read = []

    class Reading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default:
                read.append(args[0].is_contiguous(memory_format=torch.channels_last))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Reading():
        chain(random(2, 4, 9, 11), CHAINS["tucker"], None, PLAIN)
    assert read == [True]  # of the core, the only convolution


def test_depthwise_stages_become_one() -> None:
    assert [stage.axes for stage in merged(CHAINS["cp"])] == [(), (0, 1), ()]
    assert merged(CHAINS["cp"])[1].weight.shape == (5, 1, 3, 3)
    for name in ("tucker", "spatial", "kronecker"):
        assert merged(CHAINS[name]) == CHAINS[name]


def test_a_path_counts_the_positions_of_each_stage() -> None:
    stages = [shape_of(stage) for stage in CHAINS["spatial"]]
    geometry = PLAIN._replace(stride=(2, 5), padding=(1, 0))
    products = chain_path(stages, geometry, (2, 4, 9, 13)).products
    assert [(p.m, p.k, p.n) for p in products] == [(2 * 5 * 13, 4 * 3, 3), (2 * 5 * 3, 3 * 3, 6)]


@pytest.mark.parametrize("name", ["low rank", "cp", "kronecker"])
@pytest.mark.parametrize("geometry", [GEOMETRIES["strided"], GEOMETRIES["transposed"]], ids=["strided", "transposed"])
def test_gradients_of_a_chain(name: str, geometry: Geometry) -> None:
    stages = CHAINS[name]

    def run(x: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
        own = [Stage(w, s.axes, s.groups, s.leading, s.trailing) for w, s in zip(weights, stages, strict=True)]
        return chain(x, own, bias, geometry)

    given = [
        tensor.detach().requires_grad_() for tensor in (random(1, 4, 5, 4), random(6), *(s.weight for s in stages))
    ]
    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)
    frozen = [tensor.detach().requires_grad_(number == 2) for number, tensor in enumerate(given)]
    run(*frozen).square().sum().backward()
    assert frozen[2].grad is not None
    assert frozen[0].grad is None


def test_a_chain_saves_its_input_and_weights_only() -> None:
    stages = [Stage(torch.randn(16, 8, 3, 3), (0, 1)), Stage(torch.randn(8, 16, 1, 1))]
    for stage in stages:
        stage.weight.requires_grad_()
    x = torch.randn(4, 8, 20, 20)
    operands = 4 * (x.numel() + sum(stage.weight.numel() for stage in stages))
    assert saved_bytes(lambda: chain(x, stages, None, PLAIN)) == operands


def test_images_in_parts_hold_less() -> None:
    stages = [Stage(torch.randn(64, 8, 1, 1)), Stage(torch.randn(8, 64, 3, 3), (0, 1))]
    x = torch.randn(8, 8, 20, 20)
    with torch.no_grad():
        at_once = peak_bytes(lambda: chain(x, stages, None, PLAIN))
        in_parts = peak_bytes(lambda: chain(x, stages, None, PLAIN, images=1))
    hidden = 4 * 64 * 20 * 20
    assert at_once >= 8 * hidden
    assert in_parts <= 4 * x.numel() + 3 * hidden


def test_autocast_casts_as_torch_does() -> None:
    stages = [Stage(torch.randn(3, 4, 3, 3), (0, 1)), Stage(torch.randn(6, 3, 1, 1))]
    for stage in stages:
        stage.weight.requires_grad_()
    x, bias = torch.randn(2, 4, 5, 5), torch.randn(6)
    with torch.autocast("cpu", torch.bfloat16):
        y = chain(x, stages, bias, PLAIN)
        expected = F.conv2d(F.conv2d(x, stages[0].weight, padding=1), stages[1].weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()  # outside of autocast, as it is meant to be
    assert stages[0].weight.grad is not None
    assert stages[0].weight.grad.dtype == torch.float32


def test_multiply_adds_count_strides_of_later_stages() -> None:
    split = [shape_of(stage) for stage in CHAINS["spatial"]]
    assert multiply_adds(split, PLAIN) == 3 * 4 * 3 + 6 * 3 * 3
    assert multiply_adds(split, PLAIN._replace(stride=(2, 5))) == 5 * 3 * 4 * 3 + 6 * 3 * 3
    transposed = PLAIN._replace(transposed=True, stride=(2, 5), output_padding=(0, 0))
    assert multiply_adds(split, transposed) == 3 * 4 * 3 + 2 * 6 * 3 * 3
    assert multiply_adds([shape_of(CHAINS["kronecker"][0])], PLAIN) == 2 * 3 * 2 * 9


def choice(stages: list[Stage] | None, size: tuple[int, ...], geometry: Geometry, out: int, **options: Any) -> Any:
    dense = dense_shape((out, size[1] // geometry.groups * math.prod(geometry.kernel)), geometry)
    how = {"dtype": torch.float32, "device": "cpu", "cached": True, "training": False, **options}
    shapes = None if stages is None else [shape_of(stage) for stage in stages]
    return faster_of(shapes, dense, geometry, size, Path(DENSE, (), 1), **how)


def test_a_chain_is_taken_where_it_is_faster() -> None:
    half = [Stage(torch.empty(57, 128, 3, 3), (0, 1)), Stage(torch.empty(128, 57, 1, 1))]
    most = [Stage(torch.empty(110, 128, 3, 3), (0, 1)), Stage(torch.empty(128, 110, 1, 1))]
    size = (8, 128, 28, 28)
    assert choice(half, size, PLAIN, 128).path.name == CHAIN
    assert choice(half, size, PLAIN, 128).images == 8
    assert choice(most, size, PLAIN, 128).path.name == CACHED
    assert choice(None, size, PLAIN, 128).path.name == CACHED
    assert choice(None, size, PLAIN, 128, cached=False).path.name == DENSE
    assert choice(half, size, PLAIN, 128, cached=False, training=True).path.name == CHAIN


def test_a_depthwise_layer_is_computed_dense() -> None:
    geometry = PLAIN._replace(groups=96)
    stages = [Stage(torch.empty(4, 1, 3, 3), (0, 1), leading=96), Stage(torch.empty(96, 4, 1, 1), groups=96)]
    assert choice(stages, (8, 96, 28, 28), geometry, 96).path.name == CACHED


def test_wide_chains_take_a_batch_in_parts() -> None:
    wide = [
        Stage(torch.empty(160, 64, 1, 1)),
        Stage(torch.empty(160, 1, 9, 9), (0, 1), 160),
        Stage(torch.empty(64, 160, 1, 1)),
    ]
    geometry = PLAIN._replace(kernel=(9, 9), padding=(4, 4))
    found = choice(wide, (8, 64, 28, 28), geometry, 64)
    assert found.path.name == CHAIN
    assert found.images == 2


@pytest.mark.parametrize(
    ("wanted", "message"),
    [([8], r"must have 2 or 4 elements"), ([30, 8], r"output_size=\[30, 8\] must be from \[7, 7\] to \[8, 8\]")],
)
def test_impossible_output_sizes_are_refused(wanted: list[int], message: str) -> None:
    geometry = Geometry((3, 3), (2, 2), (1, 1), (1, 1), 1, True, (0, 0))
    assert geometry.output_padding_for((1, 4, 4, 4), (8, 7)) == (1, 0)
    with pytest.raises(ValueError, match=message):
        geometry.output_padding_for((1, 4, 4, 4), wanted)
