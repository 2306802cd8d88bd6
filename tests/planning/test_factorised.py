"""`Auto` compares removing the hidden units of MLPs with factorising their weights, by the estimated loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tdkit
from tdkit import Auto, Calibration, Kronecker, LowRank, Policy, Rule, Shrink
from tdkit.planning import factorised
from tdkit.planning.plan import Plan


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def calibration(model: nn.Module) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return tdkit.calibrate(model, [torch.randint(64, (2, 32), generator=generator) for _ in range(4)])


def kinds(plan: Plan) -> set[str]:
    return {step.decomposition.name for step in plan.rewritten if step.decomposition is not None}


def loss(plan: Plan) -> float:
    return sum(step.loss or 0.0 for step in plan)


def planned(model: nn.Module, calibration: Calibration, kind: Auto) -> Plan:
    return tdkit.plan(model, Policy([Rule("model.layers.*", kind)], budget=0.7), calibration=calibration)


def test_the_plan_of_less_estimated_loss_is_taken(
    model: nn.Module, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Auto(among=(Shrink(), LowRank()))
    monkeypatch.setattr(factorised, "SHRUNK", 1e9)
    apart = planned(model, calibration, kind)
    assert kinds(apart) == {"low_rank"}
    assert loss(apart) == pytest.approx(loss(planned(model, calibration, Auto(among=(LowRank(),)))))
    monkeypatch.setattr(factorised, "SHRUNK", 1e-9)
    assert kinds(planned(model, calibration, kind)) == {"shrink", "low_rank"}
    smaller = tdkit.compress(copy.deepcopy(model), apart, calibration=calibration)
    assert sum(p.numel() for p in smaller.parameters()) == apart.params_after


def test_without_low_rank_there_is_nothing_to_compare(
    model: nn.Module, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factorised, "SHRUNK", 1e9)
    assert "shrink" in kinds(planned(model, calibration, Auto(among=(Shrink(), Kronecker()))))
