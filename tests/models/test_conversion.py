"""Plain layers in place of factorised ones: dense again, or the factors one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from torch import Tensor, nn

import tdkit
from tdkit import CanonicalPolyadic, Kronecker, LowRank, Policy, Rule, SpatialLowRank, TTMatrix, Tucker
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.decompositions.registered import decompositions
from tdkit.errors import OptionError, TdkitError
from tdkit.models.hosts.base import FactorizedModule
from tests.conftest import TiedModel, make_gpt2, make_llama
from tests.kinds import OF_MATRICES

every = pytest.mark.parametrize("name", [name for name in OF_MATRICES if name != "auto"])


def compressed(model: Any, kind: Any = None, match: str = "*") -> Any:
    return tdkit.compress(model, Policy([Rule(match, kind or LowRank(rank=4))], allow_growth=True), progress=False)


def is_plain(model: nn.Module) -> bool:
    return not any(isinstance(module, FactorizedModule | FactorizedMatrix) for module in model.modules())


def shape_of(model: nn.Module) -> Any:
    """What must be as before: classes, names, shapes and ties."""
    first: dict[int, str] = {}
    parameters = [
        (n, tuple(p.shape), first.setdefault(id(p), n)) for n, p in model.named_parameters(remove_duplicate=False)
    ]
    return [(name, type(module)) for name, module in model.named_modules()], parameters


class Mixed(nn.Module):
    """Every kind of host: in place, with parameters of its own, convolutions, packed and recurrent ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1, padding_mode="reflect")
        self.back = nn.ConvTranspose2d(12, 8, 3, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 6, bidirectional=True, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(12, 10))
        self.scale = nn.Parameter(torch.randn(10, 10))

    def forward(self, x: Tensor) -> Tensor:
        h = self.back(torch.relu(self.conv(x))).flatten(2).mT[:, ::4]
        h = self.lstm(self.attention(h, h, h)[0])[0]
        y: Tensor = self.normed(h) @ self.scale
        return y


def experts() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 60, "experts_implementation": "eager"}
    config = MixtralConfig(**sizes, **more, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    return MixtralForCausalLM(config).eval()


@every
@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_a_language_model_is_dense_again(make: Callable[[], Any], name: str, ids: Tensor) -> None:
    dense = make()
    model = tdkit.compress(copy.deepcopy(dense), Policy([Rule("*", decompositions.get(name)())], budget=0.6))
    expected = model(ids).logits
    assert tdkit.to_dense(model) is model
    assert is_plain(model)
    assert shape_of(model) == shape_of(dense)
    torch.testing.assert_close(model(ids).logits, expected)
    model.tie_weights()
    torch.testing.assert_close(model(ids).logits, expected)
    assert model.all_tied_weights_keys == dense.all_tied_weights_keys
    model.load_state_dict(dense.state_dict())
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)


def test_a_model_that_is_dense_again_is_saved_as_any_other(ids: Tensor, tmp_path: Any) -> None:
    model = compressed(make_gpt2())
    expected = tdkit.to_dense(model)(ids).logits
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).eval()
    assert is_plain(read)
    torch.testing.assert_close(read(ids).logits, expected)


def test_every_kind_of_layer_is_dense_again() -> None:
    dense = Mixed().eval()
    model = compressed(copy.deepcopy(dense), LowRank(rank=2))
    assert any(isinstance(module, FactorizedModule) for module in model.modules())
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    tdkit.to_dense(model)
    torch.testing.assert_close(model(x), expected)
    plain = copy.deepcopy(dense)
    nn.utils.parametrize.remove_parametrizations(plain.normed, "weight")  # the factors are those of its result
    assert shape_of(model)[0] == shape_of(plain)[0]
    assert sorted(shape_of(model)[1]) == sorted(shape_of(plain)[1])


def test_stacks_of_experts_are_dense_again(ids: Tensor) -> None:
    dense = experts()
    model = tdkit.compress(copy.deepcopy(dense), Policy([Rule("*experts*", LowRank())], budget=0.8), progress=False)
    expected = model(ids).logits
    tdkit.to_dense(model)
    assert shape_of(model) == shape_of(dense)
    torch.testing.assert_close(model(ids).logits, expected)


def test_what_the_layers_had_besides_their_weights_is_kept() -> None:
    model = TiedModel().to(torch.bfloat16)
    model.down.requires_grad_(False)
    seen = []
    model.up.register_forward_hook(lambda *_: seen.append("up"))
    compressed(model)
    model.train()
    tdkit.to_dense(model)
    assert model.head.weight is model.embed.weight
    assert model.training
    assert model.up.training
    assert not model.down.weight.requires_grad
    assert model.up.weight.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(torch.tensor([[1, 2]]))
    assert seen == ["up"]


def test_the_model_itself_becomes_dense_again() -> None:
    layer = compressed(nn.Linear(8, 6), LowRank(rank=2))
    x = torch.randn(3, 8)
    expected = layer(x)
    assert tdkit.to_dense(layer) is layer
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(x), expected)


def test_only_some_layers_become_dense_and_the_others_stay(ids: Tensor) -> None:
    model = compressed(make_gpt2())
    expected = model(ids).logits
    tdkit.to_dense(model, only=["*.wte", "transformer.h.0.*"])
    assert type(model.transformer.wte) is nn.Embedding
    assert type(model.lm_head) is nn.Linear, "the head shares its weight"
    assert model.lm_head.weight is model.transformer.wte.weight
    assert is_plain(model.transformer.h[0])
    assert isinstance(model.transformer.h[1].mlp.c_fc, FactorizedModule)
    model.tie_weights()
    torch.testing.assert_close(model(ids).logits, expected)
    assert tdkit.compress(model, Policy([Rule("*.wte", LowRank(rank=3))], allow_growth=True)) is model


def test_a_pattern_without_a_layer_is_an_error(tied: Any) -> None:
    compressed(tied)
    with pytest.raises(OptionError, match="only='upp' matches none of the 4 factorised layers; did you mean 'up'"):
        tdkit.to_dense(tied, only=["down", "upp"])
    assert isinstance(tied.down, FactorizedModule)


def test_a_model_without_factors_stays_as_it_is(tied: Any) -> None:
    before = shape_of(tied)
    assert tdkit.to_dense(tied) is tied
    assert shape_of(tied) == before


def test_what_is_offloaded_is_an_error(tied: Any, tmp_path: Any) -> None:
    compressed(tied)
    disk_offload(tied, str(tmp_path), execution_device="cpu")
    for convert in (tdkit.to_dense, tdkit.to_sequential):
        with pytest.raises(TdkitError, match="embed is offloaded by accelerate: take its hooks off first"):
            convert(tied)
    assert isinstance(tied.up, FactorizedModule)


def test_a_padding_row_that_is_zero_stays_zero() -> None:
    model = nn.Sequential(nn.Embedding(20, 12, padding_idx=3))
    for convert in (tdkit.to_dense, tdkit.to_sequential):
        twin = convert(compressed(copy.deepcopy(model)))
        assert is_plain(twin)
        y = twin(torch.tensor([3, 4]))
        assert not y[0].any()
        assert y[1].any()


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_low_rank_pairs_become_two_layers_each(make: Callable[[], Any], ids: Tensor) -> None:
    model = compressed(make())
    expected, params = model(ids).logits, sum(p.numel() for p in model.parameters())
    assert tdkit.to_sequential(model) is model
    assert is_plain(model)
    torch.testing.assert_close(model(ids).logits, expected)
    first, second = model.lm_head
    assert (type(first), type(second)) == (nn.Linear, nn.Linear)
    assert first.bias is None
    embedding, linear = model.get_input_embeddings()
    assert (type(embedding), type(linear)) == (nn.Embedding, nn.Linear)
    assert embedding.weight is second.weight, "the tie of the larger factor is kept"
    assert sum(p.numel() for p in model.parameters()) == params + linear.weight.numel()
    model.tie_weights()
    torch.testing.assert_close(model(ids).logits, expected)
    assert list(model.all_tied_weights_keys) == ["lm_head.1.weight"]


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(6, 10, 3),
    "all options": lambda: nn.Conv2d(6, 10, (3, 5), stride=(2, 1), padding=(1, 4), dilation=(1, 2), bias=False),
    "same": lambda: nn.Conv2d(6, 10, (3, 5), padding="same"),
    "circular": lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(6, 10, 3, stride=2, padding=1, output_padding=1),
}


@pytest.mark.parametrize("layer", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (LowRank(rank=4), 2),
        (Tucker(rank_out=4, rank_in=3), 3),
        (CanonicalPolyadic(rank=5), 4),
        (SpatialLowRank(rank=4), 2),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_convolutions_become_a_chain_of_plain_ones(layer: str, kind: Any, count: int) -> None:
    model = compressed(nn.Sequential(CONVOLUTIONS[layer]()), kind)
    x = torch.randn(2, 6, 11, 12)
    expected, params = model(x), sum(p.numel() for p in model.parameters())
    kept = type(CONVOLUTIONS[layer]())
    tdkit.to_sequential(model)
    assert [type(each) for each in model[0]] == [kept] * count
    assert sum(p.numel() for p in model.parameters()) == params
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_layers_without_a_chain_stay_and_are_named() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12), nn.Conv2d(4, 4, 3, groups=2))
    rules = [Rule("0", Kronecker(terms=2)), Rule("*", LowRank(rank=2))]
    tdkit.compress(model, Policy(rules, allow_growth=True), progress=False)
    kept = model[0]
    with pytest.warns(
        UserWarning, match=r"of 0 \(Linear, kronecker.*\), 2 \(Conv2d, low_rank.*: they stay as they are"
    ):
        tdkit.to_sequential(model)
    assert model[0] is kept
    assert type(model[1]) is nn.Sequential


def test_a_model_without_any_chain_is_an_error() -> None:
    model = compressed(nn.Sequential(nn.Linear(12, 8)), TTMatrix(ranks=2))
    with pytest.raises(TdkitError, match=r"of 0 \(Linear, tt_matrix.*convert them with tdkit.to_dense"):
        tdkit.to_sequential(model)
    assert isinstance(model[0], FactorizedModule)


def test_frozen_factors_and_hooks_stay_in_a_chain() -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    compressed(model)
    model[0].matrix.left.requires_grad_(False)
    tdkit.to_sequential(model.train())
    first, second = model[0]
    assert (first.weight.requires_grad, second.weight.requires_grad) == (True, False)
    assert second.training
    model(torch.ones(1, 12))
    assert seen == ["hook"]
