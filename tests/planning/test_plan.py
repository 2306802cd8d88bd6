"""A plan prints, and is the same after JSON."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import tdkit
from tdkit import LowRank, PermutedKronecker, Plan, Policy, Rule
from tdkit.decompositions.registered import decompositions
from tdkit.errors import PolicyError
from tdkit.planning.plan import percent
from tdkit.support.tables import render
from tests.kinds import OF_MATRICES


def a_plan(tied: Any) -> Plan:
    return tdkit.plan(tied, Policy([Rule("up", keep=True), Rule("*", PermutedKronecker())], budget=0.7))


@pytest.mark.parametrize("name", OF_MATRICES)
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
    assert "relative error" in render(tdkit.applied_plan(tied).report(), 200)


def test_a_long_plan_groups_equal_layers() -> None:
    model = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 8)}) for _ in range(30))
    plan = tdkit.plan(model, Policy([Rule("*.fc", LowRank(rank=2))]))
    text = str(plan)
    assert "*.fc (30 layers)" in text
    assert "kept: no rule matches it: *.out (30 layers)" in text
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
        ({"kept": {"odd": {"kind": "Linear"}}}, r"kept 'odd': .* must have kind, shape, reason and others"),
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


def a_mixed_model() -> nn.Module:
    layers = [nn.ModuleDict({"fc": nn.Linear(8, 8), "odd": nn.Linear(8, 8, dtype=torch.complex64)}) for _ in range(25)]
    return nn.ModuleDict({"blocks": nn.ModuleList(layers), "kernel": nn.Conv3d(4, 6, (1, 2, 3), dtype=torch.complex64)})


def test_the_first_line_says_which_share_is_rewritten_and_which_is_kept() -> None:
    plan = tdkit.plan(a_mixed_model(), Policy([Rule("blocks.?.fc", LowRank(rank=2))]))
    assert plan.weights == 25 * 128 + 144
    assert plan.share_rewritable == 25 * 64 / plan.weights
    assert plan.share_rewritten == 10 * 64 / plan.weights
    first, second = str(plan).splitlines()[:2]
    assert first == "of 3,344 weights 47.8% can be rewritten: 19.1% are (640 -> 320), 80.9% are kept (2,704)"
    assert second == "3,750 -> 3,430 params (ratio 0.9147), 10 of 51 tensors rewritten; 22.8 kB -> 21.5 kB"


@pytest.mark.parametrize(
    ("share", "down", "up"), [(1.0, "100.0%", "100.0%"), (0.99999, "99.9%", "100.0%"), (0.00001, "0.0%", "0.1%")]
)
def test_shares_are_rounded_so_that_all_and_nothing_are_exact(share: float, down: str, up: str) -> None:
    assert (percent(share), percent(share, up=True)) == (down, up)


def test_weights_that_cannot_be_rewritten_have_shape_size_and_reason() -> None:
    plan = tdkit.plan(a_mixed_model(), Policy([Rule("blocks.?.fc", LowRank(rank=2))]))
    assert len(plan.table(every=True).rows) == 51
    rows = [row.cells for row in plan.table(every=True).rows if "complex64" in row.cells["becomes"]]
    assert len(rows) == 26
    assert rows[-1]["becomes"].startswith("kept: its dtype is complex64")
    assert [rows[-1][name] for name in ("layer", "shape", "params", "of dense")] == [
        "kernel",
        "6x4x1x2x3",
        "144",
        "100.0%",
    ]


def test_what_is_kept_is_summed_up_by_reason() -> None:
    lines = str(tdkit.plan(a_mixed_model(), Policy([Rule("blocks.?.fc", LowRank(rank=2))]))).splitlines()
    kept = [line for line in lines if line.startswith("kept: ")]
    assert kept[0] == "kept: no rule matches it: blocks.*.fc (15 layers); 960 params"
    assert kept[1].startswith("kept: its dtype is complex64")
    assert kept[1].endswith("blocks.*.odd (25 layers), kernel; 1,744 params")
    assert len(kept) == 2


def long_names() -> nn.Module:
    """Layers with names as those of language models, as deep, and as wide."""
    layer = {"self_attn": nn.ModuleDict({f"{n}_proj": nn.Linear(64, 64, device="meta") for n in "qkvo"})}
    layer["mlp"] = nn.ModuleDict({"up_proj": nn.Linear(64, 4096, device="meta")})
    layers = nn.ModuleList(copy.deepcopy(nn.ModuleDict(layer)) for _ in range(24))
    return nn.ModuleDict({"transformer": nn.ModuleDict({"layers": layers})})


@pytest.mark.parametrize("kind", [LowRank(rank=9), decompositions.get("tt_matrix")(ranks=4)])
def test_a_plan_can_be_read_at_80_columns(kind: Any) -> None:
    plan = tdkit.plan(long_names(), Policy([Rule("*_proj", kind)]))
    narrow, wide = (render(plan.report(), width).splitlines() for width in (80, 200))
    assert max(map(len, narrow)) <= 80
    for name in ("q_proj x24", "up_proj x24"):
        assert any(name in line for line in narrow), "names are broken at their dots only"
    assert "transformer.layers.*.mlp.up_proj (24 layers)" in "\n".join(wide)
    assert any(line.startswith("not shown at this width: shape, multiply-adds") for line in narrow)
    assert not any("not shown" in line for line in wide)
    assert "6.29M" in "\n".join(narrow)
    assert "6,291,456" in "\n".join(wide)
    assert len(narrow) < 30


def test_a_narrower_table_still_holds_every_row() -> None:
    plan = tdkit.plan(long_names(), Policy([Rule("*_proj", LowRank(rank=9))]))
    text = render(plan.report(), 60)
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("low_rank(") == 5


def test_plans_of_version_1_are_read_without_sizes() -> None:
    form = tdkit.plan(a_mixed_model(), Policy([Rule("blocks.?.fc", LowRank(rank=2))])).to_dict()
    form["version"], form["kept"] = 1, {name: entry["reason"] for name, entry in form["kept"].items()}
    for key in ("weights", "share_rewritable", "share_rewritten", "warnings"):
        del form[key]
    for step in form["steps"]:
        del step["computed"]
    old = Plan.from_dict(form)
    assert "complex64" in old.kept["kernel"]
    assert old.warnings == ()
    assert str(old).splitlines()[0].endswith(", and 26 tensors of unknown size are kept")


def test_what_is_stored_as_factors_and_computed_dense_is_told() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.table = nn.Parameter(torch.randn(16, 16))

    model = Table()
    plan = tdkit.plan(model, Policy([Rule("*", LowRank(rank=2))]))
    assert plan["fc"].computed == "by factors"
    assert plan["table"].computed == "dense"
    assert plan["table"].multiply_adds_after == plan["table"].multiply_adds_before
    assert "low_rank(rank=2), computed dense" in str(plan)
    tdkit.compress(model, plan)
    assert tdkit.applied_plan(model)["table"].computed == "dense"


def test_sizes_beyond_every_machine_are_refused_at_once(tied: Any) -> None:
    form = tdkit.plan(tied, Policy([Rule("up", LowRank(rank=2))])).to_dict()
    step = next(step for step in form["steps"] if step["names"] == ["up"])
    for shape in ([10**12, 10**12], [2**41, 1], [2] * 17):
        step["shape"] = shape
        with pytest.raises(PolicyError, match=r"shape=\[.* must be two sizes or more"):
            Plan.from_dict(form)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"version": NaN}', "\x00"])
def test_any_text_that_is_no_plan_is_told(text: str) -> None:
    with pytest.raises(PolicyError, match="not a tdkit plan"):
        Plan.from_json(text)
