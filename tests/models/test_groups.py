"""Groups of weights that share hidden units: found by pattern, in every family, without those that cannot shrink."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tdkit.errors import RegistryError
from tdkit.models import groups as module
from tdkit.models.groups import Bundle, Pattern, groups_of
from tdkit.models.shrinking import masked, shrunk
from tdkit.models.sites import survey


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
    groups = found(model)
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


@pytest.mark.parametrize("wrong", ["shape", "shared", "convolution"])
def test_weights_that_cannot_shrink_are_no_group(wrong: str) -> None:
    model = nn.Sequential(Mlp(), Mlp())
    first: Any = model[0]
    if wrong == "shape":
        first.up_proj = nn.Linear(8, 11)
    elif wrong == "shared":
        model.add_module("again", nn.Sequential(first.up_proj))
    else:
        first.down_proj = nn.Conv1d(12, 8, 1)
    assert [group for group in found(model) if group[0].startswith("0.gate")] == []
    assert ["1.gate_proj", "1.up_proj", "1.down_proj"] in found(model)


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
        model.set_submodule(user.layer, user.host.resized(user.module, new.weight, new.bias))
    assert sum(p.numel() for p in model.parameters()) == 5 * Bundle((group,)).shape[1] + 8
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_packages_add_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    class One:
        def names(self) -> list[str]:
            return ["theirs"]

        def get(self, name: str) -> object:
            return given

    monkeypatch.setattr(module, "patterns", One())
    given: object = (Pattern(("0",), "2"),)
    assert found(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))) == [["0", "2"]]
    given = ["0"]
    with pytest.raises(RegistryError, match="group pattern 'theirs' must be a tuple of"):
        found(Mlp())
