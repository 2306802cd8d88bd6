"""Groups of weights that share hidden units: found by pattern, in every family, without those that cannot shrink."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tdkit import Metric
from tdkit.errors import RegistryError
from tdkit.fitting.elimination import eliminate
from tdkit.models.groups import registered
from tdkit.models.groups.group import Bundle
from tdkit.models.groups.mlp import Mlp as Names
from tdkit.models.groups.registered import groups_of, refusal
from tdkit.models.shrinking import masked, problem_of, shrunk
from tdkit.models.sites import survey
from tdkit.models.swap import Resized, swapping


class Mlp(nn.Module):
    def __init__(self, width: int = 8, units: int = 12, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, units, bias)
        self.up_proj = nn.Linear(width, units, bias)
        self.down_proj = nn.Linear(units, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(8, 24)
        self.down_proj = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        y: torch.Tensor = self.down_proj(torch.relu(gate) * up)
        return y


def found(model: nn.Module, *shared: str) -> list[list[str]]:
    return [[site.name for site in group.sites] for group in groups_of(survey(model).sites, shared)]


TRANSFORMERS = {
    "Llama": ({}, ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 2}, ["mlp.c_fc", "mlp.c_proj"]),
    "Bert": ({}, ["intermediate.dense", "output.dense"]),
    "OPT": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, ["fc1", "fc2"]),
    "Phi3": ({"pad_token_id": 0}, ["mlp.gate_up_proj", "mlp.down_proj"]),
    "GPTNeoX": ({}, ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
    "DistilBert": ({"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}, ["ffn.lin1", "ffn.lin2"]),
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_mlps_of_families_are_groups(family: str) -> None:
    import transformers

    options, names = TRANSFORMERS[family]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(vocab_size=60, **{**sizes, **options})
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(config)
    groups = [group for group in found(model) if "attn" not in group[0]]
    assert len(groups) == 2
    for group in groups:
        assert all(name.endswith(end) for name, end in zip(group, names, strict=True))


def test_the_encoder_and_the_decoder_of_a_t5_have_groups() -> None:
    from transformers import T5Config, T5Model

    for kind, producers in (("relu", ["wi"]), ("gated-gelu", ["wi_0", "wi_1"])):
        config = T5Config(
            vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, feed_forward_proj=kind
        )
        groups = found(T5Model(config))
        assert [[name.rpartition(".")[2] for name in group] for group in groups] == [[*producers, "wo"]] * 2


def test_a_plain_torch_layer_is_one_too() -> None:
    assert found(nn.TransformerEncoderLayer(8, 2, 12)) == [["linear1", "linear2"]]


def test_names_that_are_given_make_a_group() -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))})
    assert found(model) == []
    assert found(model, "0", "2") == [["block.0", "block.2"]]


WRONG: dict[str, tuple[str, nn.Module]] = {
    "gate_proj is shared with again": ("", nn.Identity()),
    "down_proj is a Conv1d, whose size is not changed": ("down_proj", nn.Conv1d(12, 8, 1)),
}


@pytest.mark.parametrize("why", WRONG)
def test_weights_that_cannot_shrink_are_refused_with_the_reason(why: str) -> None:
    model = Mlp()
    name, other = WRONG[why]
    if name:
        model.add_module(name, other)
    else:
        model.add_module("again", model.gate_proj)
    (group,) = groups_of(survey(model).sites)
    assert refusal(group) == why


def test_weights_of_other_shapes_are_no_group() -> None:
    model = Mlp()
    model.gate_proj = nn.Linear(8, 11)
    model.up_proj = nn.Linear(8, 11)
    assert found(model) == []


def test_a_bundle_has_the_size_of_its_weights_and_of_the_biases_that_go_with_a_unit() -> None:
    model = nn.Sequential(Mlp(), Mlp())
    groups = groups_of(survey(model).sites)
    assert Bundle(tuple(groups[:1])).shape == (12, 8 + 1 + 8 + 1 + 8)
    assert Bundle(tuple(groups)).params == sum(p.numel() for p in model.parameters()) - 2 * 8


@pytest.mark.parametrize("kind", [Mlp, Packed])
def test_smaller_weights_compute_as_the_whole_ones_with_units_switched_off(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x, units = kind(), torch.randn(5, 8), torch.tensor([0, 3, 4, 7, 11])
    (group,) = groups_of(survey(model).sites)
    whole, smaller = masked(group, units, None), list(shrunk(group, units))
    user = group.consumer.site.users[0]
    user.module.weight.data.copy_(whole.weight)
    expected = model(x)
    for site, new in zip(group.sites, smaller, strict=True):
        user = site.users[0]
        assert isinstance(new, Resized)
        model.set_submodule(user.layer, user.host.resized(user.module, new.weight, new.bias))
    assert sum(p.numel() for p in model.parameters()) == 5 * Bundle((group,)).shape[1] + 8
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_packages_add_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    class One:
        def names(self) -> list[str]:
            return ["theirs"]

        def get(self, name: str) -> object:
            return given

    monkeypatch.setattr(registered, "patterns", One())
    given: object = (Names(("0",), "2"),)
    assert found(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))) == [["0", "2"]]
    given = ["0"]
    with pytest.raises(RegistryError, match="group pattern 'theirs' must be a tuple of tdkit"):
        found(Mlp())


class Attention(nn.Module):
    """Four query heads that share two of keys and values, with rotary position embeddings of halves or neighbours."""

    head_dim = 6

    def __init__(self, *, neighbours: bool = False) -> None:
        super().__init__()
        self.neighbours = neighbours
        for name, out in (("q_proj", 24), ("k_proj", 12), ("v_proj", 12)):
            self.add_module(name, nn.Linear(10, out, bias=False))
        self.o_proj = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (tokens, 10)
        def heads(name: str) -> torch.Tensor:
            y: torch.Tensor = self.get_submodule(name)(x)
            return y.reshape(len(x), -1, 6).transpose(0, 1)

        angles = torch.arange(len(x))[:, None] * torch.tensor([1.0, 0.1, 0.01])
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

        if self.neighbours:
            cos, sin = cos[:, :3].repeat_interleave(2, 1), sin[:, :3].repeat_interleave(2, 1)

        def turned(y: torch.Tensor) -> torch.Tensor:
            if self.neighbours:
                return y * cos + torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2) * sin
            return y * cos + torch.cat([-y[..., 3:], y[..., :3]], -1) * sin

        keys, values = (each.repeat_interleave(2, 0) for each in (turned(heads("k_proj")), heads("v_proj")))
        weights = (turned(heads("q_proj")) @ keys.mT).softmax(-1)
        y: torch.Tensor = self.o_proj((weights @ values).transpose(0, 1).reshape(len(x), -1))
        return y


def attention() -> tuple[nn.Module, torch.Tensor, dict[str, Metric]]:
    """An attention, inputs, and the metrics of the weights that are refitted."""
    torch.manual_seed(0)
    model, x, metrics = Attention().double(), torch.randn(50, 10).double(), {}
    for name in ("q_proj", "o_proj"):
        layer = model.get_submodule(name)
        inputs, outputs = (
            torch.randn(90, layer.weight.shape[1]).double(),
            torch.randn(90, layer.weight.shape[0]).double(),
        )
        metrics[name] = Metric(inputs.T @ inputs, outputs.T @ outputs)
    return model, x, metrics


@pytest.mark.parametrize("consumer", ["q_proj", "o_proj"])
def test_attention_with_fewer_dimensions_computes_as_its_refitted_consumer_does(consumer: str) -> None:
    model, x, metrics = attention()
    group = next(g for g in groups_of(survey(model).sites) if g.name == consumer)
    metric = metrics[consumer]
    problem = problem_of(group, metric)
    elimination = eliminate(problem.weight, problem.metric, problem.columns, heads=group.heads)
    units = elimination.kept(group.units // 2)
    assert len(units) == group.heads * (group.units // 2)
    whole, smaller = masked(group, units, metric), shrunk(group, units, metric)
    with torch.no_grad():
        dense = group.consumer.site.weight.clone()
        error = metric.squared_error(dense - whole.weight)
        assert error == pytest.approx(elimination.error(group.units // 2), rel=1e-3)
        group.consumer.site.weight.copy_(whole.weight)
        expected = model(x)
        group.consumer.site.weight.copy_(dense)
        with swapping(model) as swap:
            swap.put(list(zip(group.sites, smaller, strict=True)))
        assert torch.allclose(model(x), expected)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * sum(p.numel() for p in Attention().parameters())


def test_combined_values_lose_less_than_single_ones() -> None:
    model, _, metrics = attention()
    group = next(g for g in groups_of(survey(model).sites) if g.name == "o_proj")
    combined = problem_of(group, metrics["o_proj"])
    single = problem_of(replace(group, combines=False), metrics["o_proj"])
    for units in (2, 5, 8):
        errors = [eliminate(p.weight, p.metric, p.columns, block=1).error(units) for p in (combined, single)]
        assert errors[0] < errors[1]


def test_all_units_kept_change_nothing() -> None:
    model, x, metrics = attention()
    expected = model(x)
    groups = groups_of(survey(model).sites)
    assert [(group.heads, group.units) for group in groups] == [(2, 3), (2, 6)]
    with swapping(model) as swap, torch.no_grad():
        for group in groups:
            made = shrunk(group, torch.arange(group.heads * group.units), metrics[group.name])
            swap.put(list(zip(group.sites, made, strict=True)))
    assert torch.allclose(model(x), expected)


def test_a_bias_keeps_attention_whole() -> None:
    model = Attention()
    model.k_proj = nn.Linear(10, 12)
    reasons = {group.name: refusal(group) for group in groups_of(survey(model).sites)}
    assert reasons == {"q_proj": "k_proj has a bias, which would have to lose rows too", "o_proj": None}
