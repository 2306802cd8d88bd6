"""Adapters stay dense unless a rule names them. The modules have the names that peft gives to its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import PolicyError


class Adapted(nn.Module):
    """A layer with the attributes of a LoRA layer of peft."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(32, 32)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, 32, bias=False)})
        self.lora_embedding_A = nn.ParameterDict({"default": torch.randn(8, 40)})
        self.lora_magnitude_vector = nn.ModuleDict({"default": nn.Linear(8, 8, bias=False)})


class Listed(nn.Module):
    """A layer of another adapter, which lists its modules as peft's do."""

    adapter_layer_names = ("tiny_left",)

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(32, 32)
        self.tiny_left = nn.ModuleDict({"default": nn.Linear(32, 16, bias=False)})
        self.other = nn.Linear(32, 16)


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"q": Adapted(), "k": Listed()})


def rewritten(model: nn.Module, *rules: Rule) -> list[str]:
    return [step.name for step in tdkit.plan(model, Policy(rules)).rewritten]


def test_wildcards_leave_adapters_as_they_are(model: nn.Module) -> None:
    plan = tdkit.plan(model, Policy([Rule("*", LowRank(rank=2))]))
    assert [step.name for step in plan.rewritten] == ["q.base_layer", "k.base_layer", "k.other"]
    for name, part in {
        "q.lora_A.default": "lora_A",
        "q.lora_B.default": "lora_B",
        "q.lora_embedding_A.default": "lora_embedding_A",
        "q.lora_magnitude_vector.default": "lora_magnitude_vector",
        "k.tiny_left.default": "tiny_left",
    }.items():
        assert plan[name].reason == f"it belongs to an adapter ({part}), which only a rule that names it rewrites"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.lora_A.*", ["q.lora_A.default"]),
        ("*lora_*", ["q.lora_A.default", "q.lora_B.default", "q.lora_embedding_A.default"]),
        ("re:.*\\.lora_[AB]\\..*", ["q.lora_A.default", "q.lora_B.default"]),
        ("k.tiny_left.default", ["k.tiny_left.default"]),
    ],
)
def test_a_rule_that_names_an_adapter_rewrites_it(model: nn.Module, pattern: str, names: list[str]) -> None:
    assert set(names) <= set(rewritten(model, Rule(pattern, LowRank(rank=2))))


def test_a_later_rule_may_name_what_an_earlier_one_passes_by(model: nn.Module) -> None:
    found = rewritten(model, Rule("*", LowRank(rank=2)), Rule("*.lora_A.*", LowRank(rank=1)))
    assert "q.lora_A.default" in found
    assert "q.lora_B.default" not in found


def test_a_rule_that_matches_adapters_only_says_how_to_name_them(model: nn.Module) -> None:
    with pytest.raises(PolicyError, match=r"'\*.default' matches only weights of an adapter, such as q.lora_A.default"):
        rewritten(model, Rule("*.default", LowRank(rank=2)))
    with pytest.raises(PolicyError, match=r"name the adapter in the pattern \('\*.lora_A.\*'\)"):
        rewritten(model, Rule("*.default", LowRank(rank=2)))


def test_a_rule_may_keep_adapters_by_wildcards(model: nn.Module) -> None:
    plan = tdkit.plan(model, Policy([Rule("*.default", keep=True), Rule("*", LowRank(rank=2))]))
    assert plan["q.lora_A.default"].reason == "kept by rule '*.default'"


def test_ordinary_names_are_no_adapters() -> None:
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("explora_head", "lora", "flora_A")})
    assert len(rewritten(model, Rule("*", LowRank(rank=2)))) == 3
