"""The host passes the contract; its layers are planned, calibrated, compressed, saved and loaded by a fresh process."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import tdkit
import torch
from safetensors.torch import save_file
from tdkit import Kronecker, LowRank, Policy, Rule
from tdkit.models.hosts.registered import dense_layer, host_of, hosts
from tdkit.testing import Check, host_checks
from torch import Tensor, nn

from tdkit_example.scaled_linear import FactorizedScaledLinear, ScaledLinear, ScaledLinearHost


def scaled() -> ScaledLinear:
    layer = ScaledLinear(12, 18)
    with torch.no_grad():
        layer.scale.uniform_(0.5, 2.0)
        layer.bias.normal_()
    return layer


def classifier() -> nn.Sequential:
    """One of its layers is of this package."""
    return nn.Sequential(OrderedDict(first=scaled(), relu=nn.ReLU(), last=nn.Linear(18, 5)))


@pytest.mark.parametrize("check", host_checks(scaled, lambda: [torch.randn(2, 3, 12)]), ids=str)
def test_contract(check: Check) -> None:
    check()


def test_it_is_found_by_its_entry_point() -> None:
    assert hosts.origins()["scaled_linear"] == ["tdkit-example"]
    assert type(host_of(scaled())) is ScaledLinearHost


def test_a_calibrated_fit_uses_what_the_host_observes() -> None:
    model, x = classifier(), torch.randn(64, 12) * torch.logspace(0, -2, 12)
    labels = torch.randint(5, (64,))

    def loss(output: Tensor, _: object) -> Tensor:
        return nn.functional.cross_entropy(output, labels, reduction="sum")

    calibration = tdkit.calibrate(model, [x], loss=loss)
    metric = calibration.metric("first.kernel")
    assert metric is not None
    assert metric.input is not None
    torch.testing.assert_close(metric.input, (x.T @ x / 64).double(), rtol=1e-5, atol=1e-7)
    weight = model.first.kernel.detach().T
    plain, fitted = (LowRank(rank=3).fit(weight, m) for m in (None, metric))
    assert metric.squared_error(weight - fitted.dense()) < metric.squared_error(weight - plain.dense())
    policy = Policy([Rule("*", LowRank())], budget=0.7)
    plan = tdkit.plan(model, policy, calibration=calibration)
    assert plan["first.kernel"].kinds == ("ScaledLinear",)
    tdkit.compress(model, policy, calibration=calibration, passes=2)
    assert isinstance(model.first, FactorizedScaledLinear)


def test_an_undone_layer_is_dense_again() -> None:
    model, x = classifier(), torch.randn(4, 12)
    tdkit.compress(model, Policy([Rule("first.kernel", LowRank(rank=3))]))
    compressed = model.first
    dense = dense_layer(compressed)
    assert type(dense) is ScaledLinear
    torch.testing.assert_close(dense(x), compressed(x))


RELOAD = """
import sys
from collections import OrderedDict
import torch, tdkit
from safetensors.torch import load_file
from torch import nn
from tdkit_example.scaled_linear import ScaledLinear
torch.set_num_threads(1)
x = load_file(sys.argv[2])["x"]
dense = nn.Sequential(OrderedDict(first=ScaledLinear(12, 18), relu=nn.ReLU(), last=nn.Linear(18, 5)))
model = tdkit.load(sys.argv[1], model=dense)
print(type(model.first).__name__, model(x).double().sum().item())
"""


def test_a_fresh_process_loads_what_was_planned_with_the_allocator_and_saved(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, x = classifier().eval(), torch.randn(6, 12)
    policy = Policy([Rule("*", Kronecker())], budget=0.6, allocation="by_size")
    tdkit.compress(model, policy)
    tdkit.save(model, tmp_path / "saved")
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "saved"), str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["FactorizedScaledLinear", str(model(x).double().sum().item())]
