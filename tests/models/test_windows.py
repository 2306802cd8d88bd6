"""The rows of a convolution's input are those of torch's unfold; of very many an even sample is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tdkit
from tdkit.models.hosts import windows as module
from tdkit.models.hosts.convolution import geometry_of
from tdkit.models.hosts.windows import windows


def test_rows_are_those_of_unfold() -> None:
    layer, x = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), torch.randn(3, 4, 9, 8)
    rows = windows(x, geometry_of(layer), "zeros", layer(x).shape[2:])
    expected = F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1)).transpose(1, 2)
    assert torch.equal(rows, expected)


def test_rows_of_groups_are_apart() -> None:
    layer, x = nn.Conv1d(6, 4, 3, groups=2), torch.randn(2, 6, 7)
    rows = windows(x, geometry_of(layer), "zeros", (5,))
    assert rows.shape == (2, 5, 2, 9)
    assert torch.equal(rows[1, 3, 1], x[1, 3:, 3:6].flatten())


def test_rows_of_a_1_x_1_kernel_copy_nothing() -> None:
    layer, x = nn.Conv2d(4, 6, 1), torch.randn(2, 4, 3, 5)
    rows = windows(x, geometry_of(layer), "zeros", (3, 5))
    assert rows.data_ptr() == x.data_ptr()
    assert torch.equal(rows, x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("limit", ["ROWS", "ELEMENTS"])
def test_very_many_positions_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    layer = nn.Conv2d(1, 2, 2)
    x = torch.arange(2 * 21 * 21, dtype=torch.float32).view(2, 1, 21, 21)
    every = windows(x, geometry_of(layer), "zeros", (20, 20)).flatten(0, 1)
    monkeypatch.setattr(module, limit, 100 if limit == "ROWS" else 400)
    rows = windows(x, geometry_of(layer), "zeros", (20, 20))
    assert rows.shape == (1, 100, 4)
    assert torch.equal(rows, windows(x, geometry_of(layer), "zeros", (20, 20)))
    place = {tuple(row.tolist()): number for number, row in enumerate(every)}
    found = [place[tuple(row.tolist())] // 8 for row in rows[0]]
    assert found == list(range(100))  # one of every 8 positions


@pytest.mark.parametrize("few", [False, True], ids=["all positions", "a sample"])
def test_calibration_measures_moments_over_positions(monkeypatch: pytest.MonkeyPatch, few: bool) -> None:
    if few:
        monkeypatch.setattr(module, "ROWS", 40)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(5, 3, 6, 6)
    calibration = tdkit.calibrate(model, [x], loss=lambda output, _: output.square().sum())
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27)
    metric = calibration.metric("0")
    assert metric is not None
    assert metric.input is not None
    assert metric.output is not None
    full = (rows.T @ rows / len(rows)).double()
    if few:
        assert 0.01 < (metric.input - full).norm() / full.norm() < 1.0
    else:
        torch.testing.assert_close(metric.input, full, rtol=1e-5, atol=1e-5)
    y = model[0](x).detach().requires_grad_()
    model[2](model[1](y)).square().sum().backward()
    assert y.grad is not None
    gradients = y.grad.transpose(1, 3).reshape(-1, 4)
    torch.testing.assert_close(metric.output, (gradients.T @ gradients / len(x)).double(), rtol=1e-5, atol=1e-5)
