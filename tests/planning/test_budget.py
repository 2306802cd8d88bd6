"""Budgets in parameters, bytes and multiply-adds are met, and told in the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tdkit
from tdkit import Auto, Kronecker, LowRank, Plan, Policy, Rule, Tucker
from tdkit.errors import BudgetError, PolicyError
from tdkit.models.sites import num_bytes, num_params
from tdkit.planning.budget import Budget
from tests.side_packages import use_torchao

use_torchao()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 80}
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **sizes, **ids)
    ).eval()


def net() -> nn.Module:
    torch.manual_seed(0)
    wide, deep = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    return nn.Sequential(wide, nn.ReLU(), deep, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)).eval()


IDS = [torch.randint(0, 80, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)]
IMAGES = [
    (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.tensor([0, 3, 5, 9])) for i in range(2)
]


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kind", [LowRank(), Kronecker()])
def test_a_budget_in_bytes_is_met_and_told_exactly(dtype: str | None, kind: LowRank | Kronecker) -> None:
    ratio = {None: 0.6, "float16": 0.3, "bfloat16": 0.3, "int8": 0.2, "int4": 0.12}[dtype]
    model = llama()
    before = num_bytes(model)
    policy = Policy([Rule("*", kind)], budget={"bytes": ratio} | ({"dtype": dtype} if dtype else {}))
    plan = tdkit.plan(model, policy)
    assert plan.bytes_before == before
    tdkit.compress(model, policy)
    assert 0.93 * ratio * before < num_bytes(model) <= ratio * before
    assert plan.bytes_after == num_bytes(model)
    if dtype in ("float16", "bfloat16"):
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert torch.isfinite(model(IDS[0]).logits.float()).all()


def test_a_dtype_without_bytes_changes_the_result_and_not_the_sizes() -> None:
    plain = tdkit.plan(llama(), Policy([Rule("*", LowRank())], budget=0.6))
    asked = tdkit.plan(llama(), Policy([Rule("*", LowRank())], budget={"params": 0.6, "dtype": "int8"}))
    assert asked.params_after == plain.params_after
    assert asked.bytes_after is not None
    assert plain.bytes_after is not None
    assert asked.bytes_after < 0.3 * plain.bytes_after
    assert "in int8" in asked.summary()


@pytest.mark.parametrize("kind", [LowRank(), Tucker(), Auto()])
def test_a_budget_in_multiply_adds_counts_the_positions_of_convolutions(kind: LowRank | Tucker | Auto) -> None:
    model = net()
    calibration = tdkit.calibrate(model, IMAGES)
    assert calibration.rows == {"0": 64, "2": 16, "5": 1}
    rules = [Rule("*", kind, types=("Conv2d",)), Rule("*", LowRank())]
    plan = tdkit.plan(model, Policy(rules, budget={"multiply_adds": 0.5}), calibration=calibration)

    def total(which: str) -> float:
        return sum(calibration.rows[step.name] * getattr(step, which) for step in plan)

    assert 0.4 * total("multiply_adds_before") < total("multiply_adds_after") <= 0.5 * total("multiply_adds_before")
    by_params = tdkit.plan(model, Policy(rules, budget=0.5), calibration=calibration)
    after = {name: {s.name: s.params_after / s.params_before for s in p} for name, p in (("m", plan), ("p", by_params))}
    assert after["m"]["5"] > after["p"]["5"]  # most parameters, few multiply-adds


def test_rows_of_a_calibration_are_saved(tmp_path: Path) -> None:
    calibration = tdkit.calibrate(net(), IMAGES)
    calibration.save(tmp_path / "moments")
    assert tdkit.Calibration.load(tmp_path / "moments").rows == calibration.rows


def test_positions_that_are_not_known_are_an_error() -> None:
    with pytest.raises(BudgetError, match=r"positions that 0 multiplies is not known: give calibration="):
        tdkit.plan(net(), Policy([Rule("*", LowRank())], budget={"multiply_adds": 0.5}))


def test_look_ups_cost_no_multiply_adds_and_stay() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(50, 24), nn.Linear(24, 40)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.embed(ids))

    plan = tdkit.plan(Tagger(), Policy([Rule("*", LowRank())], budget={"multiply_adds": 0.5}))
    assert plan["embed"].decomposition is None
    assert "does not count" in plan["embed"].reason
    assert plan["out"].multiply_adds_after <= 0.5 * plan["out"].multiply_adds_before


def test_a_plan_and_a_policy_keep_their_budget() -> None:
    policy = Policy([Rule("*", LowRank())], budget={"bytes": 0.2, "dtype": "int8"})
    assert Policy.from_yaml(policy.to_yaml()) == policy
    plan = tdkit.plan(llama(), policy)
    again = Plan.from_json(plan.to_json())
    assert (again.budget, again.bytes_before, again.bytes_after) == (plan.budget, plan.bytes_before, plan.bytes_after)
    model = tdkit.compress(llama(), again)
    assert num_bytes(model) == plan.bytes_after
    assert num_params(model) == plan.params_after


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"byte": 0.2}, "did you mean 'bytes'"),
        ({"bytes": 2}, "bytes=2"),
        ({"bytes": 0.2, "dtype": "int3"}, "int3"),
        ({"dtype": "int8"}, "one of params, bytes, multiply_adds"),
        ({"bytes": 0.2, "params": 0.3}, "one of params, bytes, multiply_adds"),
        ("half", "half"),
        (True, "True"),
    ],
)
def test_what_is_no_budget_is_an_error(given: object, what: str) -> None:
    with pytest.raises(PolicyError, match=what):
        Policy([Rule("*", LowRank())], budget=given)  # type: ignore[arg-type]


def test_a_budget_below_what_is_kept_says_so_in_its_unit() -> None:
    with pytest.raises(BudgetError, match=r"bytes"):
        tdkit.plan(llama(), Policy([Rule("*.mlp.*", LowRank())], budget={"bytes": 0.2}))


def test_forms_read_back() -> None:
    for form in (0.5, {"bytes": 0.5}, {"params": 0.4, "dtype": "int4"}, {"multiply_adds": 1}):
        budget = Budget.read(form, "test")
        assert budget is not None
        assert Budget.read(budget.form, "test") == budget
