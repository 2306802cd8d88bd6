"""From a policy to a plan: pure, within the budget and close to it, every fault told before any work."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tdkit
from tdkit import Auto, Kronecker, LowRank, Policy, Rule, TTMatrix
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.registered import decompositions
from tdkit.errors import BudgetError, OptionError, PolicyError
from tdkit.models.sites import num_params
from tests.kinds import OF_MATRICES

EVERY = [decompositions.get(name) for name in OF_MATRICES]


def blocks(width: int = 24, depth: int = 2) -> nn.Module:
    return nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}) for _ in range(depth)
    )


def test_planning_changes_nothing(tied: Any) -> None:
    before, modules = copy.deepcopy(tied.state_dict()), list(tied.modules())
    state = torch.get_rng_state()
    first = tdkit.plan(tied, Policy([Rule("*", Kronecker())], budget=0.5))
    second = tdkit.plan(tied, Policy([Rule("*", Kronecker())], budget=0.5))
    assert first == second
    assert list(tied.modules()) == modules
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tied.state_dict().items())


def test_every_matrix_has_a_step_and_kept_ones_say_why(tied: Any) -> None:
    plan = tdkit.plan(tied, Policy([Rule("up", keep=True), Rule("embed", LowRank(rank=4))]))
    assert [step.names for step in plan] == [("embed", "head"), ("up",), ("down",)]
    assert plan["head"] is plan["embed"]
    assert plan["embed"].decomposition == LowRank(rank=4)
    assert plan["up"].reason == "kept by rule 'up'"
    assert plan["down"].reason == "no rule matches it"
    assert [step.name for step in plan.rewritten] == ["embed"]
    with pytest.raises(KeyError):
        plan["nothing"]


def test_the_numbers_of_a_plan_are_those_of_the_compressed_model(tied: Any) -> None:
    plan = tdkit.plan(tied, Policy([Rule("*", LowRank(rank=4))]))
    assert plan.params_before == num_params(tied)
    assert plan["embed"].params_after == 4 * (40 + 24)
    assert plan["embed"].multiply_adds_before == 40 * 24  # of the head alone: the embedding looks up
    assert plan["embed"].multiply_adds_after == 4 * (40 + 24)
    assert plan["down"].multiply_adds_before == 24 * 48
    tdkit.compress(tied, plan)
    assert num_params(tied) == plan.params_after
    assert plan.ratio == plan.params_after / plan.params_before


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.name)
@pytest.mark.parametrize("budget", [0.9, 0.66, 0.4])
def test_every_layer_spends_its_share_of_the_budget(kind: type[Decomposition], budget: float) -> None:
    model = blocks(width=48)
    plan = tdkit.plan(model, Policy([Rule("*", kind())], budget=budget))
    assert plan.params_after <= budget * plan.params_before
    assert len(plan.rewritten) == 4
    matrices = sum(step.params_before for step in plan)
    share = (int(budget * plan.params_before) - (plan.params_before - matrices)) / matrices  # biases stay
    for step in plan:
        sizes = [candidate.num_params(step.shape) for candidate in kind().candidates(step.shape)]
        most = share * step.params_before
        largest = max(size for size in sizes if size <= most)
        assert largest - 0.1 * most <= step.params_after <= largest  # the shape of factors counts before a tenth


@given(width=st.integers(12, 40), budget=st.floats(0.3, 0.95))
@settings(max_examples=25, deadline=None)
def test_a_low_rank_budget_is_met_for_any_width(width: int, budget: float) -> None:
    with torch.device("meta"):
        model = blocks(width)
    plan = tdkit.plan(model, Policy([Rule("*", LowRank())], budget=budget))
    assert plan.params_after <= budget * plan.params_before
    slack = 4 * 5 * width / plan.params_before  # less than one rank for each of four layers
    assert plan.ratio > budget - slack


def test_the_budget_is_of_the_whole_model_fixed_and_kept_layers_included() -> None:
    model = blocks()
    rules = [Rule("0.up", LowRank(rank=2)), Rule("0.down", keep=True), Rule("*", LowRank())]
    plan = tdkit.plan(model, Policy(rules, budget=0.6))
    assert plan["0.up"].decomposition == LowRank(rank=2)
    assert plan.params_after <= 0.6 * plan.params_before
    assert plan.ratio > 0.55


def test_a_rule_s_own_budget_is_of_its_layers() -> None:
    model = blocks()
    plan = tdkit.plan(model, Policy([Rule("*.up", LowRank(), budget=0.5), Rule("*.down", LowRank(), budget=0.25)]))
    for part, budget in (("up", 0.5), ("down", 0.25)):
        steps = [step for step in plan if step.name.endswith(part)]
        share = sum(s.params_after for s in steps) / sum(s.params_before for s in steps)
        assert budget - 0.06 < share <= budget


def test_two_rules_with_one_pattern_keep_their_own_budgets() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(48, 48), "look": nn.Embedding(48, 48)})
    rules = [
        Rule("*", LowRank(), types=("Linear",), budget=0.5),
        Rule("*", LowRank(), types=("Embedding",), budget=0.25),
    ]
    plan = tdkit.plan(model, Policy(rules))
    assert plan["fc"].params_after == 12 * 96
    assert plan["look"].params_after == 6 * 96


def test_a_budget_of_one_keeps_everything(tied: Any) -> None:
    plan = tdkit.plan(tied, Policy([Rule("*", LowRank())], budget=1.0))
    assert plan.rewritten == ()
    assert plan.params_after == plan.params_before


@pytest.mark.parametrize("budget", [0.01, 0.2])
def test_a_budget_that_cannot_be_met(budget: float) -> None:
    model = blocks()
    with pytest.raises(BudgetError, match=rf"policy budget={budget} (leaves|cannot be met)"):
        tdkit.plan(model, Policy([Rule("0.up", LowRank())], budget=budget))
    with pytest.raises(BudgetError, match=r"rule '\*' with budget=0.001 leaves .* too few .*raise the budget"):
        tdkit.plan(model, Policy([Rule("*", LowRank(), budget=0.001)]))


def test_growth_must_be_allowed() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(12, 12)})
    plan = tdkit.plan(model, Policy([Rule("fc", LowRank(rank=12))]))
    assert plan.rewritten == ()
    assert plan["fc"].reason == "low_rank(rank=12) would hold 288 params, not fewer (allow_growth permits it)"
    plan = tdkit.plan(model, Policy([Rule("fc", LowRank(rank=12))], allow_growth=True))
    assert plan["fc"].params_after == 288
    plan = tdkit.plan(model, Policy([Rule("fc", LowRank(rank=6))]))  # as many as dense: nothing is gained
    assert plan.rewritten == ()


def test_impossible_options_are_told_together_and_before_any_work() -> None:
    model = blocks()
    rules = [Rule("*.up", LowRank(rank=99)), Rule("*.down", Kronecker(terms=1, a=(5, 7)))]
    with pytest.raises(OptionError) as raised:
        tdkit.plan(model, Policy(rules))
    text = str(raised.value)
    assert "0.up: low_rank: rank=99 is above the full rank 24 of a 96x24 matrix" in text
    assert "1.down: kronecker: a=5x7 does not divide a 24x96 matrix" in text
    assert len(text.splitlines()) == 4


def test_a_rank_that_some_weights_cannot_have_keeps_them_dense_with_the_reason() -> None:
    model = nn.ModuleDict({"types": nn.Embedding(2, 32), "fc": nn.Linear(24, 24), "conv": nn.Conv2d(3, 8, 3)})
    plan = tdkit.plan(model, Policy([Rule("*", LowRank(rank=8), types=("Embedding", "Linear"))]))
    assert [step.name for step in plan.rewritten] == ["fc"]
    assert plan["types"].reason == "low_rank: rank=8 is above the full rank 2 of a 2x32 matrix"
    plan = tdkit.plan(model, Policy([Rule("*", Kronecker(terms=1, a=(8, 1)))]))
    assert [step.name for step in plan.rewritten] == ["fc", "conv"]
    assert plan["types"].reason == "kronecker: a=8x1 does not divide a 2x32 matrix"
    with pytest.raises(OptionError, match="types: low_rank: rank=8 is above the full rank 2"):  # named, if not alone
        tdkit.plan(model, Policy([Rule("re:types|fc", LowRank(rank=8))]))
    with pytest.raises(OptionError, match="types: low_rank: rank=8 is above the full rank 2"):  # it fits nothing else
        tdkit.plan(model, Policy([Rule("t*", LowRank(rank=8))]))


def test_an_open_rank_needs_a_budget() -> None:
    message = r"0\.up, 0\.down.*: tt_matrix\(\) leaves its rank open and no budget chooses it"
    with pytest.raises(OptionError, match=message):
        tdkit.plan(blocks(), Policy([Rule("*", TTMatrix())]))


def test_the_plan_that_a_model_carries(tied: Any) -> None:
    planned = tdkit.plan(tied, Policy([Rule("embed", LowRank(rank=4)), Rule("up", TTMatrix(ranks=3))]))
    tdkit.compress(tied, planned)
    carried = tdkit.applied_plan(tied)
    assert carried.params_before == planned.params_before
    assert carried.params_after == planned.params_after
    for step in planned.rewritten:
        same = carried[step.name]
        assert same.names == step.names
        assert same.kinds == step.kinds
        assert same.decomposition == step.decomposition
        assert same.multiply_adds_before == step.multiply_adds_before
        assert same.multiply_adds_after == step.multiply_adds_after
        assert same.error is not None
        assert 0 < same.error < 1
    assert carried["down"].reason == "dense"


def test_the_plan_says_how_each_matrix_will_be_multiplied() -> None:
    plan = tdkit.plan(nn.Sequential(nn.Linear(768, 3072), nn.Embedding(50, 24)), Policy([Rule("*", LowRank())], 0.5))
    first, table = plan.steps
    assert first.paths == ("right, left", "right, left")
    assert table.paths is None  # its rows are looked up
    again = tdkit.Plan.from_json(plan.to_json())
    assert again == plan
    old = plan.to_dict()
    for step in old["steps"]:
        del step["paths"]  # as plans were written before
    assert [step.paths for step in tdkit.Plan.from_dict(old)] == [None, None]
    assert "right, left" in str(plan)


def test_a_weight_that_cannot_become_smaller_is_kept_with_the_reason() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(24, 24), "tiny": nn.Linear(2, 2)})
    for kind in (LowRank(), LowRank(rank=3)):
        plan = tdkit.plan(model, Policy([Rule("*", kind)], budget=0.5))
        assert [step.name for step in plan.rewritten] == ["fc"]
        assert plan["tiny"].reason == "no low_rank decomposition holds fewer parameters"
    with pytest.raises(OptionError, match="tiny: low_rank: rank=3 is above the full rank 2 of a 2x2 matrix"):
        tdkit.plan(model, Policy([Rule("fc", LowRank(rank=3)), Rule("tiny", LowRank(rank=3))]))
    assert tdkit.plan(model, Policy([Rule("tiny", LowRank(rank=2))], allow_growth=True))["tiny"].params_after == 8


@dataclass(frozen=True, kw_only=True)
class OfKernels(LowRank):
    """A decomposition of tensors of four dimensions only."""

    name = "of_kernels"
    orders = frozenset({4})


def test_a_wildcard_passes_by_weights_of_other_orders() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3), "fc": nn.Linear(24, 24)})
    told = "of_kernels takes weights of 4 dimensions, not a 24x24 one"
    rules = [Rule("conv", keep=True), Rule("*", OfKernels(rank=2))]
    assert tdkit.plan(model, Policy(rules))["fc"].reason == told
    with pytest.raises(OptionError, match=f"fc: {told}"):
        tdkit.plan(model, Policy([Rule("fc", OfKernels(rank=2))]))


def test_a_plan_of_a_meta_model_says_when_it_needs_numbers() -> None:
    with torch.device("meta"):
        model = blocks()
    for kind in (LowRank(), Kronecker()):
        assert tdkit.plan(model, Policy([Rule("*", kind)], budget=0.5)).ratio <= 0.5
    with pytest.raises(PolicyError, match=r"0.up is on the meta device and holds no numbers, .* load the model"):
        tdkit.plan(model, Policy([Rule("*", Auto())], budget=0.5))


def test_a_floor_of_the_policy_holds_and_a_rule_lifts_it() -> None:
    model = blocks()
    with pytest.raises(BudgetError, match="raise the budget or match more layers"):
        tdkit.plan(model, Policy([Rule("*", LowRank())], budget=0.3, min_keep=0.5))
    rules = [Rule("*.up", LowRank(), min_keep=0), Rule("*.down", LowRank())]
    plan = tdkit.plan(model, Policy(rules, budget=0.4, min_keep=0.5))
    assert all(step.params_after > 0.45 * step.params_before for step in plan if step.name.endswith("down"))
    assert all(step.params_after < 0.35 * step.params_before for step in plan if step.name.endswith("up"))


def test_a_budget_error_says_how_much_cannot_be_rewritten() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(24, 24), "odd": nn.Linear(48, 48, bias=False, dtype=torch.complex64)})
    with pytest.raises(BudgetError, match=r"already holds 0.802 of the params, 0.793 of the params are in w"):
        tdkit.plan(model, Policy([Rule("*", LowRank())], budget=0.5))


def test_options_that_no_member_of_a_stack_can_meet_are_told() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 12, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    with pytest.raises(OptionError, match=r"experts.gate_up_proj: .*rank=99"):
        tdkit.plan(model, Policy([Rule("*.experts.*", LowRank(rank=99))]))
    plan = tdkit.plan(model, Policy([Rule("*.experts.*", LowRank(rank=2))]))
    assert len(plan.rewritten) == 2
