"""What must survive when a factorised layer takes a dense one's place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tdkit
from tdkit import Kronecker, LowRank, Policy, Rule
from tdkit.models.hosts.embedding import FactorizedEmbedding
from tdkit.models.hosts.in_place import InPlaceHost
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.models.hosts.registered import host_of
from tdkit.models.sites import survey


def compressed(module: nn.Module, name: str = "layer", rank: int = 2) -> Any:
    """`module` inside a model, after it was compressed."""
    model = nn.ModuleDict({name: module})
    tdkit.compress(model, Policy([Rule(name, LowRank(rank=rank))]))
    return model[name]


def conv1d(width: int = 12, out: int = 18) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module: nn.Module = Conv1D(out, width)
    with torch.no_grad():
        module.bias.normal_()  # type: ignore[union-attr,operator]
    return module


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 18), conv1d], ids=["Linear", "Conv1D"])
def test_full_rank_layers_compute_what_the_dense_ones_did(make: Any) -> None:
    dense = make()
    x = torch.randn(5, 3, 12)
    expected, weight = dense(x), dense.weight.detach().clone()
    model = nn.ModuleDict({"layer": dense})
    tdkit.compress(model, Policy([Rule("layer", LowRank(rank=12))], allow_growth=True))
    assert isinstance(model["layer"], FactorizedLinear)
    torch.testing.assert_close(model["layer"](x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model["layer"].weight, weight, rtol=1e-4, atol=1e-5)


def test_a_full_rank_embedding_looks_up_what_the_dense_one_did() -> None:
    dense, ids = nn.Embedding(20, 12), torch.tensor([[3, 0], [19, 3]])
    expected = dense(ids)
    model = nn.ModuleDict({"layer": dense})
    tdkit.compress(model, Policy([Rule("layer", LowRank(rank=12))], allow_growth=True))
    assert type(model["layer"]) is FactorizedEmbedding
    torch.testing.assert_close(model["layer"](ids), expected, rtol=1e-4, atol=1e-5)


def test_a_bias_stays_the_same_parameter_and_none_stays_none() -> None:
    dense = nn.Linear(12, 18)
    bias = dense.bias
    assert compressed(dense).bias is bias
    assert compressed(nn.Linear(12, 18, bias=False)).bias is None
    module = conv1d()
    assert compressed(module).bias is module.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [LowRank(rank=2), Kronecker(terms=2)], ids=str)
def test_dtype_survives(dtype: torch.dtype, kind: tdkit.Decomposition) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(12, 18), "look": nn.Embedding(20, 12)}).to(dtype)
    tdkit.compress(model, Policy([Rule("*", kind)]))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model["layer"](torch.randn(2, 12, dtype=dtype)).dtype == dtype
    assert model["look"](torch.tensor([1])).dtype == dtype
    assert model["layer"].matrix.error < 1


def test_training_mode_survives_layer_by_layer() -> None:
    model = nn.ModuleDict({"a": nn.Linear(12, 18), "b": nn.Linear(12, 18)})
    model["a"].eval()
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]))
    assert not model["a"].training
    assert not model["a"].matrix.training
    assert model["b"].training
    assert model["b"].matrix.training


def test_a_frozen_weight_gives_frozen_factors_and_the_bias_keeps_its_own_switch() -> None:
    frozen = nn.Linear(12, 18)
    frozen.weight.requires_grad_(False)
    layer = compressed(frozen)
    assert not any(p.requires_grad for p in layer.matrix.parameters())
    assert layer.bias.requires_grad
    free = nn.Linear(12, 18)
    free.bias.requires_grad_(False)
    layer = compressed(free)
    assert all(p.requires_grad for p in layer.matrix.parameters())
    assert not layer.bias.requires_grad


def test_hooks_survive_and_their_handles_remove_them() -> None:
    dense, calls = nn.Linear(12, 18), []
    handles = [
        dense.register_forward_hook(lambda *_: calls.append("forward")),
        dense.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True),
        dense.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    layer = compressed(dense)
    layer(torch.randn(2, 12, requires_grad=True)).sum().backward()
    assert sorted(calls) == ["backward", "forward", "pre"]
    for handle in handles:
        handle.remove()
    calls.clear()
    layer(torch.randn(2, 12, requires_grad=True)).sum().backward()
    assert calls == []


def test_state_dict_hooks_survive() -> None:
    dense, seen = nn.Linear(12, 18), []
    dense.register_state_dict_post_hook(lambda *given: seen.append(given[2]))
    model = nn.ModuleDict({"layer": dense})
    tdkit.compress(model, Policy([Rule("layer", LowRank(rank=2))]))
    model.state_dict()
    assert seen == ["layer."]


def test_padding_idx_survives_with_its_value_and_without_gradient() -> None:
    zero, other = nn.Embedding(20, 12, padding_idx=3), nn.Embedding(20, 12, padding_idx=-1)
    with torch.no_grad():
        other.weight[19] = 1.0
    zero_layer, other_layer = compressed(zero), compressed(other)
    ids = torch.tensor([3, 19, 4])
    assert zero_layer.padding_idx == 3
    assert not zero_layer(ids)[0].any()
    assert other_layer.padding_idx == 19
    assert other_layer(ids)[1].any()
    for layer, padding in ((zero_layer, 3), (other_layer, 19)):
        layer(ids).square().sum().backward()
        gradient = layer.matrix.left.grad
        assert not gradient[padding].any()
        assert gradient[4].any()


def test_names_and_order_survive() -> None:
    model = nn.Sequential(nn.Linear(12, 18), nn.ReLU(), nn.Linear(18, 12))
    before = [name for name, _ in model.named_children()]
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]))
    assert [name for name, _ in model.named_children()] == before
    assert isinstance(model[1], nn.ReLU)
    assert model(torch.randn(2, 12)).shape == (2, 12)


class OwnLinear(nn.Linear):
    """A forward of its own, which a swap would lose."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "module",
    [
        OwnLinear(4, 4),
        nn.Bilinear(4, 4, 4),
        nn.LayerNorm(4),
        nn.LSTM(4, 4),
        nn.EmbeddingBag(4, 4),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_other_types_change_in_place(module: nn.Module) -> None:
    assert type(host_of(module)) is InPlaceHost


def test_a_class_that_only_shares_conv1d_s_name_has_another_layout() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

    assert type(host_of(Conv1D())) is InPlaceHost


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_that_work_on_dense_rows_compute_dense(option: dict[str, Any]) -> None:
    model = nn.ModuleDict({"look": nn.Embedding(20, 12, **option)})
    ids = torch.tensor([[1, 19, 1]])
    dense = copy.deepcopy(model)
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=12))], allow_growth=True))
    output, expected = model["look"](ids), dense["look"](ids)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    matrix = model["look"].matrices["weight"]
    slope = torch.autograd.grad(matrix.dense(), [matrix.left], dense["look"].weight.grad)[0]
    torch.testing.assert_close(matrix.left.grad, slope, rtol=1e-3, atol=1e-4)


def test_an_embedding_with_sparse_gradients_says_why_it_stays() -> None:
    model = nn.ModuleDict({"look": nn.Embedding(20, 12, sparse=True), "layer": nn.Linear(12, 18)})
    found = survey(model)
    assert [site.name for site in found.sites] == ["layer"]
    assert found.untouchable[0].reason.startswith("Embedding with sparse=True works on dense rows")


def test_a_forward_replaced_on_the_instance_is_kept() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(12, 18)})
    layer = model["layer"]
    layer.forward = lambda x: nn.Linear.forward(layer, x) * 2
    x = torch.randn(3, 12)
    expected = layer(x)
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=12))], allow_growth=True))
    assert model["layer"] is layer
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_multihead_attention_is_rewritten_alone_or_as_part() -> None:
    model = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 12)
    attention = model.self_attn
    expected = attention(x, x, x, need_weights=False)[0]
    tdkit.compress(model, Policy([Rule("linear*", LowRank(rank=3))]))
    assert model.self_attn is attention
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected)
    tdkit.compress(model, Policy([Rule("self_attn.*", LowRank(rank=12))], allow_growth=True))
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        fast = model(x)
    slow = model(x.requires_grad_())
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_a_model_moves_after_compression() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(12, 18), "look": nn.Embedding(20, 12)})
    tdkit.compress(model, Policy([Rule("*", "permuted_kronecker")], budget=0.5))
    model.to(torch.float64)
    assert model["layer"](torch.randn(2, 12, dtype=torch.float64)).dtype == torch.float64
    model.to("meta")
    assert model["layer"](torch.empty(2, 12, device="meta", dtype=torch.float64)).shape == (2, 18)
