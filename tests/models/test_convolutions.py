"""Factorised convolutions behave as the dense ones, and a network of them goes through everything."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.decompositions.tucker import Tucker
from tdkit.evaluation.timing import peak_bytes, saved_bytes
from tdkit.models.hosts.convolution import FactorizedConvolution, FactorizedTransposedConvolution
from tdkit.models.hosts.registered import dense_layer
from tdkit.models.preparation import cached_bytes
from tdkit.models.sites import survey


def compressed(layer: nn.Module, rank: int = 3) -> nn.Module:
    """The layer with factors of low rank."""
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    tdkit.compress(model, Policy([Rule("layer", LowRank(rank=rank))]))
    return cast(nn.Module, model["layer"])


def twins(layer: nn.Module, rank: int = 3) -> tuple[nn.Module, nn.Module]:
    """A factorised layer and the dense one of the same weight."""
    small = compressed(layer, rank)
    return small, dense_layer(small)  # type: ignore[arg-type]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1), (2, 8, 11)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 9, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, dilation=(1, 2, 1)), (2, 4, 5, 6, 4)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 9, 7)),
    "circular": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (2, 8, 9, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1), (2, 8, 5, 4)),
}
EVERY = pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS)


@EVERY
def test_outputs_and_gradients_equal_those_of_the_dense_weight(make: Callable[[], nn.Module], size: Any) -> None:
    small, dense = twins(make().double())
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    y, expected = small(x), dense(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(small.weight + 0, dense.weight)
    slope = torch.randn_like(expected)
    own = torch.autograd.grad(y, [x, small.bias, *small.matrix.parameters()], slope)
    theirs = torch.autograd.grad(expected, [x, dense.bias, dense.weight], slope)
    torch.testing.assert_close(own[:2], theirs[:2])
    through = torch.autograd.grad(small.weight + 0, list(small.matrix.parameters()), theirs[2])
    torch.testing.assert_close(own[2:], through)


@EVERY
def test_gradcheck(make: Callable[[], nn.Module], size: Any) -> None:
    small = compressed(make().double(), rank=2).train()
    names = [name for name, _ in small.named_parameters()]
    x = torch.randn((1, *size[1:]), dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(small, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *small.parameters()), fast_mode=True)


@EVERY
def test_one_image_without_a_batch(make: Callable[[], nn.Module], size: Any) -> None:
    small, dense = twins(make())
    x = torch.randn(size[1:])
    torch.testing.assert_close(small(x), dense(x))
    torch.testing.assert_close(small(input=x), dense(x))


@EVERY
def test_autocast_and_compile(make: Callable[[], nn.Module], size: Any) -> None:
    small, dense = twins(make())
    x = torch.randn(size)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = small(x), dense(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.05)
    y.float().sum().backward()
    found = torch.compile(small, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, dense(x))


@pytest.mark.parametrize("name", [name for name, (_, size) in LAYERS.items() if len(size) == 4])
def test_channels_last(name: str) -> None:
    make, size = LAYERS[name]
    small, dense = twins(make())
    small, dense = (layer.to(memory_format=torch.channels_last) for layer in (small, dense))
    x = torch.randn(size).contiguous(memory_format=torch.channels_last)
    for prefer in ("memory", "speed"):
        tdkit.prepare(small, prefer=prefer)
        with torch.no_grad():
            torch.testing.assert_close(small(x), dense(x))


def test_an_odd_total_of_same_padding_comes_after() -> None:
    small, dense = twins(nn.Conv2d(4, 6, (4, 2), padding="same"))
    circular, dense_circular = twins(nn.Conv2d(4, 6, (4, 2), padding="same", padding_mode="circular"))
    x = torch.randn(2, 4, 7, 6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        torch.testing.assert_close(small(x), dense(x))
        torch.testing.assert_close(circular(x), dense_circular(x))


def test_output_size_of_a_transposed_convolution() -> None:
    small, dense = twins(nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1))
    assert isinstance(small, FactorizedTransposedConvolution)
    x = torch.randn(2, 4, 5, 4)
    for size in ([14, 12], [2, 6, 15, 10]):
        torch.testing.assert_close(small(x, output_size=size), dense(x, output_size=size))
    with pytest.raises(ValueError, match=r"output_size=\[30, 12\] must be from \[13, 10\] to \[15, 12\]"):
        small(x, output_size=[30, 12])


def test_attributes_and_description_are_those_of_the_dense_layer() -> None:
    small = compressed(nn.Conv2d(8, 12, 3, stride=2, padding=1, padding_mode="reflect", bias=False))
    assert isinstance(small, FactorizedConvolution)
    assert (small.in_channels, small.out_channels, small.kernel_size, small.stride) == (8, 12, (3, 3), (2, 2))
    assert small.replaces == "Conv2d"
    assert small.extra_repr() == (
        "8, 12, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), padding_mode=reflect, bias=False"
    )
    assert small.weight.shape == (12, 8, 3, 3)
    assert compressed(nn.ConvTranspose1d(8, 12, 3)).weight.shape == (8, 12, 3)


def test_the_dense_weight_is_cached_where_the_stages_are_slower() -> None:
    layer, x = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False), torch.randn(2, 32, 10, 10)
    thin, wide = compressed(layer, 2), compressed(layer, 26)
    for small, size in ((thin, 0), (wide, 4 * layer.weight.numel())):
        tdkit.prepare(small, prefer="speed")
        expected = F.conv2d(x, small.weight, small.bias, padding=1)
        torch.testing.assert_close(small(x), expected)
        assert cached_bytes(small) == size
        torch.testing.assert_close(small(x), expected)
        with torch.no_grad():
            small.matrix.left.mul_(2.0)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(small(x), F.conv2d(x, small.weight, small.bias, padding=1))
        assert cached_bytes(small.train()) == 0


def test_repeated_calls_with_a_cached_weight_see_every_change() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(24, 24, 3, padding=1, groups=24)
    layer = tdkit.compress(nn.Sequential(dense), Policy([Rule("*", LowRank(rank=2))], allow_growth=True))[0]
    tdkit.prepare(layer.eval().requires_grad_(False), prefer="speed")
    x = torch.randn(2, 24, 9, 9)

    def expected() -> Tensor:
        return F.conv2d(x, layer.weight.clone(), layer.bias, layer.stride, layer.padding, 1, 24)

    def agree() -> bool:
        return all(torch.allclose(layer(x), expected(), atol=1e-5) for _ in range(2))

    with torch.no_grad():
        assert agree()
        assert layer.path(tuple(x.shape)) == "dense, cached"
        layer.matrix.left.mul_(2)
        assert agree()
        layer.stride = (2, 2)
        assert agree()
        assert layer(x).shape[-1] == 5
        layer.bias = nn.Parameter(torch.ones(24))
        assert agree()
        seen: list[Tensor] = []
        hook = layer.matrix.register_forward_hook(lambda _, args, y: seen.append(y))
        layer(x)
        hook.remove()
        layer(x)
        assert len(seen) == 1
        layer.padding_mode = "reflect"
        torch.testing.assert_close(layer(x)[..., 1:-1, 1:-1], expected()[..., 1:-1, 1:-1])
        assert not torch.allclose(layer(x), expected())
        torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_cached_calls_leave_nothing_in_the_layer_that_becomes_dense_again() -> None:
    class Own(nn.Conv2d):
        pass

    torch.manual_seed(0)
    policy = Policy([Rule("*", LowRank(rank=2))], allow_growth=True)
    model = tdkit.compress(nn.Sequential(Own(24, 24, 3, padding=1, groups=24)), policy)
    tdkit.prepare(model.eval().requires_grad_(False), prefer="speed")
    x = torch.randn(2, 24, 9, 9)
    with torch.no_grad():
        model(x), model(x)
        tdkit.to_dense(model)
        assert vars(model[0]).keys() == vars(Own(24, 24, 3, padding=1, groups=24)).keys()
        model[0].stride = (2, 2)
        expected = model(x)
        small = tdkit.prepare(tdkit.compress(model, policy), prefer="speed")
        for _ in range(3):
            torch.testing.assert_close(small(x), expected, atol=1e-5, rtol=1e-4)


def test_a_forward_in_training_saves_no_more_than_the_dense_layer() -> None:
    small, dense = twins(nn.Conv2d(32, 32, 3, padding=1), rank=14)
    x = torch.randn(8, 32, 14, 14)
    assert saved_bytes(lambda: small.train()(x)) <= 1.1 * saved_bytes(lambda: dense(x))


def test_a_plan_counts_multiply_adds_per_position() -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2), nn.Conv2d(12, 12, 3, groups=4), nn.Linear(9, 9))
    kinds = Tucker(rank_out=6, rank_in=4), LowRank(rank=1), LowRank(rank=2)
    policy = Policy([Rule(str(number), kind) for number, kind in enumerate(kinds)])
    small = copy.deepcopy(model)
    tdkit.compress(small, policy)
    for plan in (tdkit.plan(model, policy), tdkit.applied_plan(small)):
        steps = sorted(plan.steps, key=lambda step: step.name)
        assert [step.multiply_adds_before for step in steps] == [12 * 8 * 9, 12 * 3 * 9, 81]
        # the first stage runs before the stride; the kernel of the second layer for each of its groups
        assert [step.multiply_adds_after for step in steps] == [
            4 * 4 * 8 + 6 * 4 * 9 + 12 * 6,
            4 * 3 * 9 + 12,
            2 * (9 + 9),
        ]
        assert all(step.paths for step in steps)
        assert "multiply-adds / token or position" in [column.header for column in plan.table().columns]


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Centered(nn.Conv2d):
    """Convolves with another weight than its own, as weight standardisation does."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return super()._conv_forward(input, weight - weight.mean(), bias)


class PaddedOnOneSide(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 2, 0, 2)), self.weight, self.bias, self.stride)


class StrideInLists(Scaled):
    """Holds its geometry in lists, as EfficientNet's convolutions with padding of their own do."""

    def __init__(self) -> None:
        super().__init__(8, 12, 3)
        self.stride, self.padding, self.dilation = [2, 2], [1, 1], [1, 1]  # type: ignore[assignment]


class Upsampling(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size).relu()


@pytest.mark.parametrize(
    ("layer", "computed"),
    [
        (Scaled(8, 12, 3, padding=1), "by factors"),
        (Centered(8, 12, 3, padding=1), "dense"),
        (PaddedOnOneSide(8, 12, 3), "dense"),
        (StrideInLists(), "by factors"),
        (Upsampling(8, 12, 3, stride=2), "by factors"),
        (nn.ConvTranspose2d(8, 12, 3, groups=4), "dense"),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, nn.Module) else "",
)
def test_subclasses_keep_their_forward(layer: nn.Module, computed: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(layer), torch.randn(2, 8, 6, 6)
    (site,) = survey(model).sites
    assert site.users[0].host.computed(layer, "weight") == computed
    small = tdkit.compress(copy.deepcopy(model), Policy([Rule("*", LowRank(rank=3))]))
    dense = dense_layer(small[0])
    assert type(dense) is type(layer)
    torch.testing.assert_close(small(x), dense(x))
    small(x).sum().backward()
    assert all(factor.grad is not None for factor in small[0].matrices["weight"].parameters())
    loaded = tdkit.load(tdkit.save(small, tmp_path / "saved"), model=copy.deepcopy(model))
    assert torch.equal(loaded(x), small.eval()(x))
    calibration = tdkit.calibrate(model, [x], loss=lambda output, _: output.square().sum())
    metric = calibration.metric("0")
    assert metric is not None
    assert metric.input is not None
    assert metric.output is not None


def test_a_forward_that_reads_the_weight_computes_by_factors() -> None:
    model, x = nn.Sequential(PaddedOnOneSide(8, 12, 3, stride=2)), torch.randn(2, 8, 6, 6)
    small = tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]))
    dense = dense_layer(small[0])
    products: list[str] = []
    small[0].matrix.register_forward_hook(lambda *_: products.append("by factors"))
    torch.testing.assert_close(small(x), dense(x))
    assert products == ["by factors"]
    with torch.no_grad():
        torch.testing.assert_close(small(x), dense(x))
    weight = small[0].weight
    with torch.no_grad():
        torch.testing.assert_close(
            F.conv2d(x[0], weight, stride=[2], padding="valid"), F.conv2d(x[0], weight + 0, stride=2)
        )
        transposed = compressed(nn.ConvTranspose2d(8, 8, 3))
        torch.testing.assert_close(F.conv2d(x, transposed.weight), F.conv2d(x, transposed.weight + 0))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=5, num_channels=3
    )
    return ResNetForImageClassification(config).eval()


@pytest.mark.parametrize("kind", ["low_rank", "tucker", "cp", "spatial_low_rank", "kronecker"])
def test_a_resnet_goes_through_everything(kind: str, tmp_path: Path) -> None:
    dense, x = resnet(), torch.randn(4, 3, 48, 48)
    labels = torch.tensor([0, 1, 2, 3])
    batch = {"pixel_values": x, "labels": labels}
    calibration = tdkit.calibrate(dense, [batch], loss=lambda output, _: output.loss)
    plan = tdkit.plan(dense, Policy([Rule("*", kind)], budget=0.5), calibration=calibration)
    assert plan.ratio <= 0.5
    assert all(len(step.shape) in (2, 4) for step in plan)
    model = tdkit.compress(copy.deepcopy(dense), plan, calibration=calibration)
    with torch.no_grad():
        expected = model(x).logits
    assert torch.isfinite(expected).all()
    loaded = tdkit.load(tdkit.save(model, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, expected)
        tdkit.prepare(loaded, prefer="speed")
        torch.testing.assert_close(loaded(x).logits, expected, rtol=1e-4, atol=1e-4)

    def forward(each: nn.Module) -> int:
        with torch.no_grad():
            return peak_bytes(lambda: each(x))

    assert forward(model) <= 1.1 * forward(dense)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model(x, labels=labels).loss
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    optimizer.step()
    with torch.no_grad():
        assert model(x, labels=labels).loss < loss


def test_the_products_of_a_subclass_with_a_forward_of_its_own_are_seen() -> None:
    torch.manual_seed(0)
    own = PaddedOnOneSide(8, 12, 3, stride=2)
    plain = nn.Conv2d(8, 12, 3, stride=2)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(2, 8, 6, 6)
    found = []
    for model in (nn.Sequential(own), nn.Sequential(nn.ZeroPad2d((0, 2, 0, 2)), plain)):
        calibration = tdkit.calibrate(model, [x], loss=lambda output, _: output.square().sum())
        found.append(calibration.metric(calibration.names[0]))
    measured, wanted = found
    assert measured is not None
    assert wanted is not None
    torch.testing.assert_close(measured.input, wanted.input)
    torch.testing.assert_close(measured.output, wanted.output)
    seen: list[torch.Size] = []
    small = tdkit.compress(nn.Sequential(own), Policy([Rule("*", LowRank(rank=3))]))[0]

    def observe(rows: Tensor, y: Tensor) -> Tensor:
        seen.extend([rows.shape, y.shape])
        return 2 * y

    before = small(x)
    handle = small.builder.attach(small, "weight", observe)  # as when a compressed model is calibrated again
    torch.testing.assert_close(small(x), 2 * before)
    handle.remove()
    torch.testing.assert_close(small(x), before)
    assert seen == [(2, 9, 72), (2, 9, 12)]


def test_the_output_of_a_chain_can_be_changed_in_place() -> None:
    """As ``ReLU(inplace=True)`` does; torch forbids it where a view is returned."""
    model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]))
    model(torch.randn(2, 6, 9, 9)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
