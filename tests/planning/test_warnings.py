"""What a plan warns of: little left of a layer, heads below their classes, small parts that pay for the whole."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import Kronecker, LowRank, Plan, Policy, Rule
from tests.conftest import make_gpt2


class Classifier(nn.Module):
    """A hidden layer and a head of ten classes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)
        self.fc = nn.Linear(64, 10)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.down(torch.relu(self.up(x))))
        return y


def warnings(model: nn.Module, *rules: Rule, **options: Any) -> str:
    return "\n".join(tdkit.plan(model, Policy(rules, **options)).warnings)


def test_a_plan_without_faults_has_no_warnings() -> None:
    rules = [Rule("fc", keep=True), Rule("*", LowRank())]
    assert warnings(Classifier(), *rules, budget=0.6) == ""


def test_layers_cut_below_a_tenth_are_named_the_smallest_first() -> None:
    text = warnings(Classifier(), Rule("up", LowRank(rank=3)), Rule("down", LowRank(rank=2)))
    assert "2 layers are cut below a tenth of the parameters (down to 3.9%, up to 5.9%): raise the budget" in text
    assert "below a tenth" not in warnings(Classifier(), Rule("up", LowRank(rank=6)))


def test_layers_below_the_default_floor_are_counted() -> None:
    rule = Rule("re:up|down", LowRank(), budget=0.045)
    assert "; 2 of them below the default min_keep=0.05" in warnings(Classifier(), rule)
    assert "default min_keep" not in warnings(Classifier(), rule, min_keep=0)  # asked for


def test_the_head_below_its_classes_is_recognised_by_its_position() -> None:
    text = warnings(Classifier(), Rule("fc", LowRank(rank=4)))
    assert text == (
        "fc, an output head (the last layer), has rank 4 for 10 outputs, which then span 4 of 10 dimensions: keep it "
        "by a rule before the others, Rule('fc', keep=True)"
    )
    assert warnings(Classifier(), Rule("fc", Kronecker(terms=2, a=(2, 8)))) == ""  # of full rank


def test_a_last_layer_whose_outputs_go_on_is_no_head() -> None:
    block = nn.ModuleDict({"up": nn.Linear(24, 96), "down": nn.Linear(96, 24)})
    assert warnings(block, Rule("down", LowRank(rank=8))) == ""


def test_a_head_of_more_classes_than_inputs_has_no_such_warning() -> None:
    assert "output head" not in warnings(
        nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 400)), Rule("1", LowRank(rank=4))
    )


@pytest.mark.parametrize(
    ("attributes", "evidence"),
    [
        ({"num_classes": 10}, "num_classes=10"),
        ({"config": type("Config", (), {"num_labels": 10})()}, "config.num_labels=10"),
    ],
)
def test_the_head_is_recognised_by_the_number_of_classes(attributes: dict[str, Any], evidence: str) -> None:
    model = Classifier(**attributes)
    model.aside = nn.Linear(64, 30)  # the last layer
    assert f"fc, an output head ({evidence}), has rank 4" in warnings(model, Rule("fc", LowRank(rank=4)))
    assert warnings(model, Rule("aside", LowRank(rank=15))) == ""


def test_the_head_is_what_the_model_returns_as_such() -> None:
    model = make_gpt2(vocab_size=20, tie_word_embeddings=False)
    text = warnings(model, Rule("lm_head", LowRank(rank=4)))
    assert "lm_head, an output head (get_output_embeddings()), has rank 4 for 20 outputs" in text

    class Timm(Classifier):
        def get_classifier(self) -> nn.Module:
            return self.fc

    assert "fc, an output head (get_classifier())" in warnings(Timm(), Rule("fc", LowRank(rank=4)))


def test_a_budget_that_a_small_part_pays() -> None:
    model = nn.ModuleDict({"small": nn.Linear(64, 64), "large": nn.Linear(80, 80, bias=False)})
    text = warnings(model, Rule("small", LowRank()), budget=0.7)
    assert "budget 0.7 is met by cutting 38.7% of the parameters to 21.8% of their size" in text
    assert "it does not choose the other 61.3%: match more layers" in text
    assert "is met by cutting" not in warnings(model, Rule("*", LowRank()), budget=0.3)


def test_a_budget_without_a_rank_to_choose() -> None:
    text = warnings(Classifier(), Rule("up", LowRank(rank=20)), budget=0.4)
    assert text == "the ratio is 0.7041, above the budget 0.4: there is no layer whose rank the budget could choose"
    assert warnings(Classifier(), Rule("up", LowRank(rank=20)), budget=0.8) == ""


def test_weights_that_rules_match_and_that_cannot_be_rewritten() -> None:
    model = nn.ModuleDict({"look": nn.Embedding(90, 32, sparse=True), "fc": nn.Linear(32, 32)})
    text = warnings(model, Rule("*", LowRank(rank=8)))
    assert text.startswith("73.7% of the weights match a rule and cannot be rewritten (look: ")
    assert "sparse=True" in text
    assert warnings(model, Rule("fc", LowRank(rank=8))) == ""  # nobody asked for the other


def test_what_is_compressed_already_is_not_compressed_again(tied: Any) -> None:
    tdkit.compress(tied, Policy([Rule("embed", LowRank(rank=8))]))
    text = warnings(tied, Rule("*", LowRank(rank=8)))
    assert "factorised already and not compressed again: embed; ratio and budget are of the model as it is" in text


def test_compress_logs_the_warnings_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy([Rule("fc", LowRank(rank=4))])
    for given in (policy, tdkit.plan(Classifier(), policy)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tdkit"):
            model = tdkit.compress(Classifier(), given)
        assert [record.message for record in caplog.records] == list(tdkit.plan(Classifier(), policy).warnings)
        assert "has rank 4 for 10 outputs" in caplog.text
        assert tdkit.applied_plan(model).warnings == tdkit.plan(Classifier(), policy).warnings


def test_warnings_are_printed_and_survive_json() -> None:
    plan = tdkit.plan(Classifier(), Policy([Rule("fc", LowRank(rank=4))]))
    assert "warning: fc, an output head" in str(plan)
    assert Plan.from_json(plan.to_json()).warnings == plan.warnings
