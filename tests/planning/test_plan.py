"""A plan prints, and is the same after JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

import tdkit
from tdkit import LowRank, PermutedKronecker, Plan, Policy, Rule
from tdkit.decompositions.registered import decompositions
from tdkit.errors import PolicyError


def a_plan(tied: Any) -> Plan:
    return tdkit.plan(tied, Policy([Rule("up", keep=True), Rule("*", PermutedKronecker())], budget=0.7))


@pytest.mark.parametrize("name", decompositions.names())
def test_json_round_trip(name: str, tied: Any) -> None:
    plan = tdkit.plan(tied, Policy([Rule("*", decompositions.get(name)())], budget=0.7))
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.to_json() == plan.to_json()


def test_a_plan_from_json_compresses_as_the_plan_does(tied: Any) -> None:
    plan = a_plan(tied)
    tdkit.compress(tied, Plan.from_json(plan.to_json()))
    assert tdkit.applied_plan(tied).params_after == plan.params_after


def test_the_table_shows_what_becomes_of_every_layer(tied: Any) -> None:
    text = str(a_plan(tied))
    for part in (
        "embed = head",
        "40x24",
        "permuted_kronecker(terms=",
        "indices)",
        "kept: kept by rule 'up'",
        "budget 0.7",
    ):
        assert part in text
    assert "relative error" not in text
    tdkit.compress(tied, a_plan(tied))
    assert "relative error" in str(tdkit.applied_plan(tied))


def test_a_long_plan_groups_equal_layers() -> None:
    model = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 8)}) for _ in range(30))
    plan = tdkit.plan(model, Policy([Rule("*.fc", LowRank(rank=2))]))
    text = str(plan)
    assert "*.fc (30 layers)" in text
    assert "*.out (30 layers)" in text
    assert len(text.splitlines()) < 12
    assert len(plan.table(every=True).rows) == 60


def test_layers_that_cannot_be_rewritten_are_listed() -> None:
    model = nn.ModuleDict({"look": nn.Embedding(9, 4, sparse=True), "fc": nn.Linear(8, 8)})
    plan = tdkit.plan(model, Policy([Rule("fc", LowRank(rank=2))]))
    assert list(plan.kept) == ["look"]
    assert "sparse" in plan.kept["look"]
    assert "look" in str(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, r"plan version 99 is newer than 2: update tdkit"),
        ({"steps": None}, r"not a tdkit plan"),
        ({"steps": [{"names": ["a"]}]}, r"not a tdkit plan"),
        ({"version": "one"}, r"not a tdkit plan"),
        ({"kept": 3}, r"not a tdkit plan"),
    ],
)
def test_a_damaged_plan_is_told(tied: Any, change: dict[str, Any], message: str) -> None:
    form = {**a_plan(tied).to_dict(), **change}
    with pytest.raises(PolicyError, match=message):
        Plan.from_json(json.dumps(form))


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("shape", [5], r"step 0: shape=\[5\] must be two sizes"),
        ("shape", "ab", "step 0: shape='ab' must be two sizes"),
        ("shape", [8, -1], r"step 0: shape=\[8, -1\] must be two sizes"),
        ("names", [], r"step 0: names=\[\] must be a list of layer names"),
        ("paths", ["dense"], r"step 0: paths=\['dense'\] must be two names"),
        ("params_after", "few", "step 0: params_after='few' must be a count"),
        ("decomposition", "low_renk", "step 0: unknown decomposition 'low_renk'; did you mean 'low_rank'"),
        ("nmaes", ["a"], "step 0: has the unknown key 'nmaes'; did you mean 'names'"),
    ],
)
def test_a_damaged_step_is_told_with_its_entry(tied: Any, entry: str, value: object, said: str) -> None:
    form = a_plan(tied).to_dict()
    form["steps"][0][entry] = value
    del form["steps"][1]["kinds"]
    with pytest.raises(PolicyError, match=said) as told:
        Plan.from_json(json.dumps(form))
    assert "step 1: lacks 'kinds'" in str(told.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", "3", "null"])
def test_foreign_json_is_told(text: str) -> None:
    with pytest.raises(PolicyError, match="not a tdkit plan"):
        Plan.from_json(text)
