"""Every weight once, with all the layers that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import PolicyError
from tdkit.models.sites import factorized_groups, num_bytes, num_params, replace_module, survey
from tests.together import run_together


def test_a_tied_weight_is_one_site_with_two_users(tied: Any) -> None:
    found = survey(tied)
    assert [site.names for site in found.sites] == [("embed", "head"), ("up",), ("down",)]
    first = found.sites[0]
    assert first.kinds == ("Embedding", "Linear")
    assert first.shape == (40, 24)
    assert first.params == 960
    assert first.multiplications() == 1  # the embedding looks rows up


def test_gpt2_and_llama_ties(gpt2: Any, llama: Any) -> None:
    names = {site.names for site in survey(gpt2).sites}
    assert ("transformer.wte", "lm_head") in names
    assert ("transformer.wpe",) in names
    assert len(survey(gpt2).sites) == 2 + 4 * 4
    assert ("model.embed_tokens", "lm_head") in {site.names for site in survey(llama).sites}
    shapes = {site.name: site.shape for site in survey(gpt2).sites}
    assert shapes["transformer.h.0.mlp.c_fc"] == (128, 32)  # (out, in), although Conv1D stores (in, out)


def test_one_module_under_two_names_is_one_site_with_both() -> None:
    layer = nn.Linear(6, 4)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(6, 4)})
    assert [site.names for site in survey(model).sites] == [("a", "b"), ("c",)]


def test_a_bare_parameter_that_shares_a_weight_is_one_of_its_users() -> None:
    class Scorer(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

    model = nn.ModuleDict({"embed": nn.Embedding(8, 4)})
    model["score"] = Scorer(model["embed"].weight)
    found = survey(model)
    assert [site.names for site in found.sites] == [("embed", "score")]


def test_tied_layers_of_different_layout_stay() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"linear": nn.Linear(6, 4), "conv": Conv1D(6, 4)})
    model["conv"].weight = model["linear"].weight
    found = survey(model)
    assert found.sites == ()
    assert found.untouchable[0].reason == "tied layers linear, conv hold it in different layouts"


def test_the_weight_of_a_model_that_is_a_single_layer_has_its_own_name() -> None:
    assert [site.name for site in survey(nn.Linear(6, 4)).sites] == ["weight"]


def test_what_is_not_rewritten_has_name_kind_params_and_reason() -> None:
    model = nn.ModuleDict({"look": nn.Embedding(18, 4, sparse=True), "fc": nn.Linear(4, 4, dtype=torch.complex64)})
    entries = {entry.name: (entry.kind, entry.params) for entry in survey(model).untouchable}
    assert entries == {"look": ("Embedding", 72), "fc": ("Linear", 16)}
    assert [entry.shape for entry in survey(model).untouchable] == [(18, 4), (4, 4)]
    reasons = [entry.reason for entry in survey(model).untouchable]
    assert "sparse=True" in reasons[0]
    assert "complex64" in reasons[1]


class Scaled(nn.Module):
    """A weight held as a matrix and a scale for each of its rows."""

    def forward(self, matrix: Tensor, scale: Tensor) -> Tensor:
        return matrix * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight, torch.ones_like(weight[:, :1])


def test_a_parametrised_weight_that_is_not_rewritten_counts_what_holds_it() -> None:
    model = nn.Linear(4, 4, dtype=torch.complex64)
    nn.utils.parametrize.register_parametrization(model, "weight", Scaled())
    [entry] = survey(model).untouchable
    assert entry.shape == (4, 4)
    assert entry.params == 16 + 4 == num_params(model) - 4  # without the bias, which is no weight
    plan = tdkit.plan(nn.ModuleList([model, nn.Linear(8, 8)]), Policy([Rule("*", LowRank(rank=2))]))
    assert tdkit.Plan.from_json(plan.to_json()) == plan
    old = plan.to_dict()
    del old["kept"]["0"]["params"]  # as plans were written before
    assert tdkit.Plan.from_dict(old).untouchable[0].params == 16


def test_factorised_layers_are_no_sites_and_are_grouped_by_their_matrix(tied: Any) -> None:
    tdkit.compress(tied, Policy([Rule("embed", LowRank(rank=3)), Rule("up", LowRank(rank=3))]))
    assert [site.name for site in survey(tied).sites] == ["down"]
    assert survey(tied).factorized == ("embed", "up")
    groups = [[user.name for user in users] for _, users in factorized_groups(tied)]
    assert groups == [["embed", "head"], ["up"]]


def test_counts_take_tied_weights_once(tied: Any) -> None:
    dense = 40 * 24 + 48 * 24 + 48 + 24 * 48 + 48
    assert num_params(tied) == dense
    assert num_bytes(tied) == 4 * dense
    tied.register_buffer("mask", torch.zeros(10, dtype=torch.bool))
    assert num_bytes(tied) == 4 * dense + 10


@pytest.mark.parametrize("name", ["fc", "inner.0", "inner.deep.layer"])
def test_replace_module_by_name(name: str) -> None:
    deep = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    inner = nn.Sequential(nn.Linear(2, 2))
    inner.add_module("deep", deep)
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "inner": inner})
    new = nn.Identity()
    replace_module(model, name, new)
    assert model.get_submodule(name) is new


def test_a_frozen_or_a_meta_model_can_be_surveyed() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"fc": nn.Linear(1 << 14, 1 << 14)})
    plan = tdkit.plan(model, Policy([Rule("fc", LowRank())], budget=0.5))
    assert plan.params_after <= 0.5 * plan.params_before
    weight: Tensor = survey(model).sites[0].weight
    assert weight.device.type == "meta"


class Wrapped(Tensor):
    """A tensor subclass, as quantised and distributed tensors are."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Wrapped:
        return torch.Tensor._make_subclass(cls, data)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (nn.Parameter(torch.randn(4, 6, dtype=torch.complex64)), "its dtype is complex64, and fits are for float16"),
        (nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False), "its dtype is int8"),
        (nn.Parameter(torch.ones(4, 6).to(torch.float8_e4m3fn), requires_grad=False), "its dtype is float8_e4m3fn"),
        (nn.Parameter(Wrapped(torch.randn(4, 6))), "Wrapped, not a plain tensor"),
    ],
    ids=["complex", "integer", "float8", "subclass"],
)
def test_weights_that_cannot_be_fitted_say_why(weight: nn.Parameter, reason: str) -> None:
    model = nn.ModuleDict({"odd": nn.Linear(6, 4, bias=False), "plain": nn.Linear(6, 4)})
    model["odd"].weight = weight
    plan = tdkit.plan(model, Policy([Rule("*", LowRank(rank=1))]))
    assert [step.name for step in plan] == ["plain"]
    assert reason in plan.kept["odd"]
    with pytest.raises(PolicyError, match=f"'odd' matches only layers that cannot be rewritten: odd .*{reason}"):
        tdkit.compress(model, Policy([Rule("odd", LowRank(rank=1))]))
    assert model["odd"].weight is weight


def test_a_lazy_layer_is_told_before_anything_is_counted() -> None:
    model = nn.ModuleDict({"lazy": nn.LazyLinear(4), "plain": nn.Linear(6, 4)})
    assert [(entry.name, entry.params) for entry in survey(model).untouchable] == [("lazy", 0), ("lazy.bias", 0)]
    with pytest.raises(PolicyError, match=r"the shapes of lazy.weight, lazy.bias are not known yet: run a batch"):
        tdkit.plan(model, Policy([Rule("plain", LowRank(rank=1))]))
    model["lazy"](torch.randn(2, 6))
    assert len(tdkit.plan(model, Policy([Rule("lazy", LowRank(rank=1))])).rewritten) == 1


SHARDED = """
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import tdkit
from tdkit import LowRank, Policy, Rule

model = nn.ModuleDict({"odd": nn.Linear(6, 4, bias=False), "plain": nn.Linear(6, 4)})
mesh = init_device_mesh("cpu", (1,))
model["odd"].weight = nn.Parameter(distribute_tensor(model["odd"].weight, mesh, [Shard(0)]))
plan = tdkit.plan(model, Policy([Rule("*", LowRank(rank=1))]))
print([step.name for step in plan], plan.untouchable[0].shape, plan.kept["odd"])
"""


def test_a_sharded_weight_stays_and_says_why(tmp_path: Path) -> None:
    (lines,) = run_together(tmp_path, SHARDED, 1)
    assert lines[0].startswith("['plain'] (4, 6) it is a torch.distributed.tensor.DTensor, not a plain tensor")
