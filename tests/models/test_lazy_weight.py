"""The weight of a factorised layer: its metadata is free, and everything else is done to the dense weight."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdkit
from tdkit import LowRank, PermutedKronecker, Policy, Rule, TTMatrix
from tdkit.errors import TdkitError
from tdkit.models.hosts.embedding import FactorizedEmbedding
from tdkit.models.hosts.linear import FactorizedConv1D, FactorizedLinear
from tdkit.models.preparation import cached_bytes, prepare
from tdkit.products.cost import CACHED

KINDS = [LowRank(rank=2), PermutedKronecker(terms=2, a=(3, 3)), TTMatrix(ranks=3)]
METADATA: list[Callable[[Tensor], Any]] = [
    lambda w: w.dtype,
    lambda w: w.device,
    lambda w: w.device.type,
    lambda w: w.shape,
    lambda w: w.size(),
    lambda w: w.size(0),
    lambda w: (w.ndim, w.dim()),
    lambda w: (w.numel(), torch.numel(w), len(w)),
    lambda w: (w.is_floating_point(), torch.is_floating_point(w), w.is_complex()),
    lambda w: (w.element_size(), w.itemsize, w.nbytes),
    lambda w: (w.layout, w.is_cuda, w.is_cpu, w.is_meta, w.is_sparse, w.is_quantized),
    lambda w: w.requires_grad,
    lambda w: isinstance(w, Tensor),
    lambda w: isinstance(w, nn.Parameter),
]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each dense weight that is built from now on."""
    seen: list[int] = []
    for kind in KINDS:
        matrix = type(kind.empty((12, 18), device="meta"))
        dense = matrix.dense

        def count(self: Any, dense: Any = dense) -> Tensor:
            seen.append(self.params)
            return dense(self)

        monkeypatch.setattr(matrix, "dense", count)
    return seen


def layer_of(kind: tdkit.Decomposition = KINDS[0], *, transposed: bool = False) -> FactorizedLinear:
    torch.manual_seed(0)
    return (FactorizedConv1D if transposed else FactorizedLinear)(kind.fit(torch.randn(12, 18)), None)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_metadata_is_that_of_the_dense_weight_and_builds_none(
    kind: tdkit.Decomposition, dtype: torch.dtype, transposed: bool, built: list[int]
) -> None:
    layer = layer_of(kind, transposed=transposed).to(dtype)
    dense = layer.matrix.dense().T if transposed else layer.matrix.dense()
    built.clear()
    for read in METADATA:
        assert read(layer.weight) == read(dense)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert read(layer.weight) == read(dense.detach())
    assert not layer_of(kind).requires_grad_(False).weight.requires_grad
    assert layer.to("meta").weight.device.type == "meta"
    assert FactorizedEmbedding(layer.matrix).weight.shape == (12, 18)
    assert built == []


def test_a_forward_of_t5_builds_no_dense_weight(built: list[int]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False)
    model = transformers.T5ForConditionalGeneration(config).eval()
    policy = Policy([Rule("*.DenseReluDense.*", LowRank(rank=2))], allow_growth=True)
    tdkit.compress(model, policy, progress=False)
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, FactorizedLinear)
    ids = torch.arange(8).reshape(1, 8)
    built.clear()
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids)
    assert built == []


OPERATIONS: list[Callable[[Tensor], Any]] = [
    lambda w: F.linear(torch.ones(2, w.shape[1]), w),
    lambda w: F.embedding(torch.arange(3), w),
    lambda w: w @ torch.ones(w.shape[1]),
    lambda w: torch.ones(w.shape[0]) @ w,
    lambda w: torch.addmm(torch.zeros(w.shape[1]), torch.ones(2, w.shape[0]), w),
    lambda w: w.T,
    lambda w: w[1:, :2],
    lambda w: torch.cat([w, w]),
    lambda w: torch.stack((w, w)),
    lambda w: w.norm(),
    lambda w: w + w,
    lambda w: w.to(torch.float64),
    lambda w: w.detach(),
    lambda w: w.data,
    lambda w: w.clone(),
    lambda w: w.tolist(),
    lambda w: w.is_contiguous(),
    lambda w: w.stride(),
    lambda w: repr(w),
    lambda w: torch.from_numpy(w.detach().numpy()),
]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_operations_are_those_of_the_dense_weight(transposed: bool, gradients: bool) -> None:
    layer = layer_of(transposed=transposed)
    dense = layer.matrix.dense().T if transposed else layer.matrix.dense()
    with torch.set_grad_enabled(gradients):
        dense = dense if gradients else dense.detach()
        for operation in OPERATIONS:
            found, expected = operation(layer.weight), operation(dense)
            if not isinstance(expected, Tensor):
                assert found == expected or isinstance(found, str)
                continue
            assert type(found) is Tensor
            assert found.requires_grad == expected.requires_grad
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_it_is_copied_saved_and_pickled_as_numbers() -> None:
    layer, file = layer_of(), io.BytesIO()
    dense = layer.matrix.dense().detach()
    with torch.no_grad():
        twins = [copy.copy(layer.weight), copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))]
        torch.save(layer.weight, file)
    file.seek(0)
    for twin in (*twins, torch.load(file)):
        assert type(twin) is Tensor
        assert torch.equal(twin, dense)
    assert copy.deepcopy(layer).weight.shape == (12, 18)
    assert list(layer.state_dict()) == ["matrix.left", "matrix.right"]


def test_its_address_stays_valid_while_it_lives() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = layer_of()
    with torch.no_grad():
        weight = layer.weight
        assert weight.data_ptr() == weight.data_ptr()
        assert torch.equal(safetensors.load(safetensors.save({"w": layer.weight}))["w"], layer.matrix.dense())


def test_one_weight_is_built_once(built: list[int]) -> None:
    weight = layer_of().weight
    built.clear()
    torch.testing.assert_close(weight @ torch.ones(18), weight.sum(1))
    assert len(built) == 1


@pytest.mark.parametrize("operation", [lambda w: w.square().sum(), lambda w: (w @ torch.ones(18)).sum()])
def test_gradients_reach_the_factors(operation: Callable[[Tensor], Tensor]) -> None:
    layer = layer_of()
    operation(layer.weight).backward()
    found = [p.grad for p in layer.parameters()]
    expected = torch.autograd.grad(operation(layer.matrix.dense()), list(layer.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_those_of_where_it_was_read() -> None:
    layer = layer_of()
    weight = layer.weight
    with torch.no_grad():
        weight.sum()
        assert not layer.weight.sum().requires_grad
    with torch.inference_mode():
        assert layer.weight.sum().is_inference()
    weight.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_under_autocast_it_keeps_the_dtype_of_the_factors() -> None:
    layer = layer_of()
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight
        assert weight.dtype == weight.clone().dtype == torch.float32
        assert torch.equal(weight, layer.weight)
    assert torch.equal(weight, layer.matrix.dense())


class Product(torch.autograd.Function):
    """x W^T as a library writes it: autograd sees the weight itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_reach_the_factors_through_what_takes_the_weight_itself(transposed: bool, scripted: bool) -> None:
    product: Any = torch.jit.script(times_transposed) if scripted else Product.apply
    layer = layer_of(transposed=transposed)
    x = torch.randn(5, 12 if transposed else 18)
    dense = layer.matrix.dense().T if transposed else layer.matrix.dense()
    y = product(x, layer.weight)
    torch.testing.assert_close(y, x @ dense.T)
    found = torch.autograd.grad(y.square().sum(), list(layer.parameters()), create_graph=True)
    expected = torch.autograd.grad((x @ dense.T).square().sum(), list(layer.parameters()), create_graph=True)
    again = [torch.autograd.grad(sum(g.square().sum() for g in gs), layer.matrix.left)[0] for gs in (found, expected)]
    for one, other in zip((*found, again[0]), (*expected, again[1]), strict=True):
        torch.testing.assert_close(one, other)


def test_a_gradient_for_factors_that_are_gone_is_an_error() -> None:
    layer = layer_of()
    y = Product.apply(torch.ones(5, 18), layer.weight)
    layer.matrix.left = nn.Parameter(torch.zeros(12, 2))
    with pytest.raises(TdkitError, match=r"replaced between the forward and the backward .*use layer.matrix.dense\(\)"):
        y.sum().backward()


def test_transforms_of_functions_pass_through_it() -> None:
    layer, x = layer_of(), torch.randn(5, 18)

    def loss(factors: dict[str, Tensor]) -> Tensor:
        def run(module: nn.Module) -> Tensor:
            return F.linear(x, module.weight).square().sum()

        return torch.func.functional_call(Applied(layer, run), factors, ())

    factors = {f"layer.{name}": p.detach() * 2 for name, p in layer.named_parameters()}
    found = torch.func.grad(loss)(factors)
    leaves = {name: factor.clone().requires_grad_() for name, factor in factors.items()}
    dense = leaves["layer.matrix.left"] @ leaves["layer.matrix.right"]
    expected = torch.autograd.grad(F.linear(x, dense).square().sum(), list(leaves.values()))
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other)
    rows = torch.func.vmap(lambda row: F.linear(row, layer.weight))(x)
    torch.testing.assert_close(rows, x @ layer.matrix.dense().T)
    torch.testing.assert_close(torch.func.vmap(lambda row: row * 2)(layer.weight), 2 * layer.matrix.dense())


class Applied(nn.Module):
    """A module as one whose forward is a function of it."""

    def __init__(self, layer: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self) -> Tensor:
        return self.run(self.layer)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_code_that_reads_it_compiles_whole(backend: str) -> None:
    layer, x = layer_of(), torch.randn(5, 18)

    def run(x: Tensor) -> Tensor:
        return F.linear(x.to(layer.weight.dtype), layer.weight)

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend=backend)(x), run(x))


def cached_layer() -> tuple[FactorizedLinear, Tensor]:
    """A layer whose weight is cached, and its input."""
    layer = prepare(FactorizedLinear(TTMatrix(ranks=16).fit(torch.randn(64, 64)), None))
    x = torch.randn(512, 64)
    with torch.no_grad():
        layer(x)
    assert layer.matrix.path(512).name == CACHED
    assert cached_bytes(layer) == 64 * 64 * 4
    return layer, x


def test_a_cached_weight_answers_products(built: list[int]) -> None:
    layer, x = cached_layer()
    transposed = FactorizedConv1D(layer.matrix, None)
    built.clear()
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(F.linear(x, layer.weight), y)
        torch.testing.assert_close(x @ transposed.weight, y)
        torch.testing.assert_close(torch.addmm(torch.zeros(64), x, transposed.weight), y)
        assert built == []
        layer.matrix.cores[0].mul_(2)
        torch.testing.assert_close(F.linear(x, layer.weight), 2 * y)
        assert len(built) == 1
        layer.double()
        torch.testing.assert_close(F.linear(x.double(), layer.weight), 2 * y.double(), rtol=1e-4, atol=1e-4)
    built.clear()
    assert F.linear(x.double(), layer.weight).requires_grad
    assert len(built) == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w.data.zero_(),
        lambda w: w.detach().numpy().fill(0),
        lambda w: nn.init.zeros_(w),
        lambda w: w.T.zero_(),
        lambda w: w.__setitem__(0, 0),
    ],
)
def test_what_is_written_into_it_changes_neither_factors_nor_cache(write: Callable[[Tensor], object]) -> None:
    layer, x = cached_layer()
    with torch.no_grad():
        expected = layer(x)
        write(layer.weight)
        assert torch.equal(layer(x), expected)
        assert torch.equal(F.linear(x, layer.weight), expected)


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 8), nn.Embedding(8, 8), nn.Conv2d(4, 4, 3)], ids=["linear", "embedding", "conv"]
)
def test_values_cannot_be_put_in_its_place(layer: nn.Module) -> None:
    """As libraries merge adapters; a value written to a weight that is computed again would be lost silently."""
    model = tdkit.compress(nn.Sequential(layer), Policy([Rule("*", LowRank(rank=2))]), progress=False)
    with pytest.raises(TdkitError, match="read-only, computed from its factors: values put in its place would be lost"):
        model[0].weight.data += 1.0
    with pytest.raises(TdkitError, match="Change the factors in `matrices`"):
        model[0].weight.data = torch.zeros(8, 8)
