"""Moments of each expert: sums, padding, members with few rows, and the weight of each in the error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdkit.calibration.stacks import StackSum, StackSums, shrunk, without_padding
from tdkit.models.hosts.routing import Routing
from tdkit.models.sites import Site

COUNTS = (400, 0, 350)
ROUTING = Routing(torch.arange(750) % 500, COUNTS, 500)


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_each_member_has_the_moment_of_its_rows_and_one_without_rows_that_of_all() -> None:
    rows = random(750, 5, seed=0)
    rows[400:] *= torch.tensor([9.0, 1, 1, 1, 1], dtype=torch.float64)
    total = StackSum(3, 5)
    half = Routing(ROUTING.tokens[:375], (200, 0, 175), 250)
    for start in (0, 1):  # every second row: two batches
        total.add(rows[start::2], half)
    moments = total.mean()
    assert moments is not None
    expected = [rows[:400].T @ rows[:400] / 400, rows.T @ rows / 750, rows[400:].T @ rows[400:] / 350]
    for found, wanted in zip(moments, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.norm()))
    torch.testing.assert_close(moments[1], expected[1])
    assert total.mean() is None  # the sum is freed


def test_float32_rows_are_summed_in_float64() -> None:
    total = StackSum(3, 5)
    total.add(random(750, 5, seed=0).float(), ROUTING)
    assert total.sum is not None
    assert total.sum.dtype == torch.float64
    assert total.bytes == 3 * 5 * 5 * 8


def test_large_moments_are_held_in_float32_and_summed_in_float64() -> None:
    site = Site((), (3, 2, 5), stacked=True)
    assert StackSums(site, limit=8 * 3 * (25 + 4)).multiply_input.dtype == torch.float64
    single = StackSums(site, limit=8 * 3 * (25 + 4) - 1)
    assert single.multiply_input.bytes == 4 * 3 * 25
    assert single.multiply_output.bytes == 4 * 3 * 4
    double = StackSums(site)
    for seed in range(200):
        for sums in (single, double):
            sums.multiply_input.add(random(750, 5, seed=seed), ROUTING)
    found, wanted = single.metric(500), double.metric(500)
    assert found is not None
    assert wanted is not None
    assert found.input is not None
    assert found.input.dtype == torch.float32
    torch.testing.assert_close(found.input.double(), wanted.input, rtol=0, atol=2e-6 * float(wanted.input.max()))


def test_moments_of_few_rows_are_shrunk_to_the_common_one_and_come_nearer_to_the_true_one() -> None:
    torch.manual_seed(0)
    size, true = 24, torch.diag(torch.linspace(3, 0.1, 24, dtype=torch.float64))
    common = torch.diag(torch.linspace(2.5, 0.3, 24, dtype=torch.float64))
    for count, least in ((6, 0.5), (100, 0.75)):
        before = after = 0.0
        for seed in range(20):
            rows = random(count, size, seed=seed) @ true.sqrt()
            measured = rows.T @ rows / count
            before += float((measured - true).square().sum())
            after += float((shrunk(measured, count, common) - true).square().sum())
        assert after < least * before
    rows = random(10**6, size, seed=0) @ true.sqrt()
    measured = rows.T @ rows / len(rows)
    torch.testing.assert_close(shrunk(measured, len(rows), common), measured, rtol=0.02, atol=0.02)
    assert torch.equal(shrunk(common, 3, common), common)


def test_padding_is_left_out_where_the_mask_has_the_tokens_of_the_call() -> None:
    routing = Routing(torch.tensor([0, 1, 3, 0, 2, 2, 3]), (3, 2, 2), 4)
    mask = torch.tensor([[True, True], [False, True]])  # token 2 is padding
    kept, real = without_padding(routing, mask)
    assert kept is not None
    assert kept.tolist() == [True, True, True, True, False, False, True]
    assert real.tokens.tolist() == [0, 1, 3, 0, 3]
    assert (list(real.counts), real.of) == ([3, 1, 1], 3)
    for other in (None, torch.ones(2, 3, dtype=torch.bool)):
        assert without_padding(routing, other) == (None, routing)


@pytest.mark.parametrize("gradients", [True, False])
def test_errors_are_those_per_token(gradients: bool) -> None:
    """The error of a stack is the mean over tokens of (g^T E x)^2 for independent g and x, or of |E x|^2."""
    sums = StackSums(Site((), (3, 4, 5), stacked=True))
    x = random(750, 5, seed=0)
    weight = nn.Parameter(random(3, 4, 5, seed=1))
    member = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    y = sums.observe(ROUTING, x, torch.einsum("ni,noi->no", x, weight[member]), mask=None, gradients=gradients)
    slopes = random(750, 4, seed=2)
    torch.autograd.backward((y * slopes).sum())
    metric = sums.metric(500)
    assert metric is not None
    gap = random(3, 4, 5, seed=3)
    seen = torch.einsum("ni,noi->no", x, gap[member])
    real = (seen * slopes).sum(1).square().sum() if gradients else seen.square().sum()
    assert metric.squared_error(gap) == pytest.approx(float(real) / 500, rel=0.1)
    assert (metric.output is not None) == gradients


def test_a_layer_that_is_not_called_has_no_metric() -> None:
    assert StackSums(Site((), (3, 4, 5), stacked=True)).metric(7) is None
