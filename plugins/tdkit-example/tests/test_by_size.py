"""The allocator meets its budget, and takes most from the largest weights."""

from __future__ import annotations

import pytest
import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import BudgetError
from tdkit.planning.allocators import allocators
from torch import nn

from tdkit_example.by_size import by_size


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 128), nn.Linear(128, 128))


def test_it_is_found_by_its_entry_point() -> None:
    assert allocators.origins()["by_size"] == ["tdkit-example"]
    assert allocators.get("by_size") is by_size


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.9])
def test_the_budget_is_met_and_large_weights_give_up_most(budget: float) -> None:
    plan = tdkit.plan(model(), Policy([Rule("*", LowRank())], budget=budget, allocation="by_size"))
    assert budget - 0.06 < plan.ratio <= budget
    shares = [step.params_after / step.params_before for step in plan]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_a_budget_that_cannot_be_met_is_told() -> None:
    with pytest.raises(BudgetError, match="params"):
        tdkit.plan(model(), Policy([Rule("*", LowRank())], budget=0.02, allocation="by_size"))
