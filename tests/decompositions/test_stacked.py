"""One decomposition for every matrix of a stack: fits, products, options, curves and what `Auto` stands for."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tdkit import Auto, Kronecker, LowRank, Metric, Policy, Rule, TTMatrix, compress, prepare
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.decompositions.stacked import Stacked, stacked
from tdkit.decompositions.stacks import LowRankStack, dense_grouped
from tdkit.errors import OptionError

SHAPE = (4, 12, 8)
COUNTS = (3, 0, 5, 1)
KINDS = {
    "low rank": Stacked(),
    "shared input": Stacked(shared=True, side="input"),
    "shared output": Stacked(shared=True, side="output"),
    "shared": Stacked(shared=True),
    "kronecker": Stacked(each=Kronecker()),
    "tensor train": Stacked(each=TTMatrix()),
}


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(size: int, seed: int) -> Tensor:
    rows = random(SHAPE[0], 40, size, seed=seed)
    rows[:, :, 0] *= 30
    return rows.mT @ rows / 40


WEIGHT = random(*SHAPE, seed=0)
METRIC = Metric(moments(SHAPE[2], 1), moments(SHAPE[1], 2))


def choices(kind: Stacked) -> Iterator[Stacked]:
    every = kind.candidates(SHAPE)
    return iter({place: every[place] for place in (0, len(every) // 2, len(every) - 1)}.values())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_factors_hold_what_is_claimed_and_the_largest_are_exact(kind: Stacked) -> None:
    params = [choice.num_params(SHAPE) for choice in kind.candidates(SHAPE)]
    assert params == sorted(params)
    for choice in choices(kind):
        fitted = choice.fit(WEIGHT)
        held = sum(parameter.numel() for parameter in fitted.parameters())
        assert choice.num_params(SHAPE) == choice.empty(SHAPE, device="meta").params == fitted.params == held
        assert torch.equal(fitted.dense(), fitted.stack().flatten(1))
        assert tuple(fitted.stack().shape) == SHAPE
        assert fitted.sizes == SHAPE
        assert 0 < fitted.multiply_adds() <= SHAPE[1] * SHAPE[2] * 4
    exact = kind.candidates(SHAPE)[-1]
    for metric in (None, METRIC):
        torch.testing.assert_close(exact.fit(WEIGHT, metric).stack(), WEIGHT)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_richest_choice_within_a_size_is_found(kind: Stacked) -> None:
    smallest, *_, largest = (choice.num_params(SHAPE) for choice in kind.candidates(SHAPE))
    for budget in (smallest - 1, smallest, (smallest + largest) // 2, largest + 10):
        for found in (kind.complete(SHAPE, budget), kind.best_within(WEIGHT, METRIC, budget)):
            if budget < smallest:
                assert found is None
            else:
                assert found is not None
                assert found.is_complete()
                assert smallest <= found.num_params(SHAPE) <= budget


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("metric", [None, METRIC], ids=["plain", "calibrated"])
def test_curves_hold_the_errors_of_fits(kind: Stacked, metric: Metric | None) -> None:
    points = kind.curve(WEIGHT, metric)
    assert len(points) > 2
    size = (metric or Metric()).squared_error(WEIGHT)
    for before, after in itertools.pairwise(points):
        assert before.params < after.params < WEIGHT.numel()
        assert before.error > after.error
    for point in points:
        fitted = point.decomposition.fit(WEIGHT, metric).dense().view(SHAPE)
        real = (metric or Metric()).squared_error(WEIGHT - fitted)
        assert point.error == pytest.approx(real, abs=1e-3 * size if metric else 1e-6 * size)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_metric_is_used_and_its_error_is_that_of_the_stack(kind: Stacked) -> None:
    choice = kind.candidates(SHAPE)[0]
    plain, calibrated = choice.fit(WEIGHT), choice.fit(WEIGHT, METRIC)
    assert choice.error(WEIGHT, calibrated, METRIC) < 0.98 * choice.error(WEIGHT, plain, METRIC)
    gap = METRIC.squared_error(WEIGHT - calibrated.stack()) / METRIC.squared_error(WEIGHT)
    assert choice.error(WEIGHT, calibrated, METRIC) == pytest.approx(gap**0.5)


def test_low_rank_members_are_fitted_in_batches_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Stacked(each=LowRank(rank=3)).fit(WEIGHT, METRIC).stack()
    for number in range(SHAPE[0]):
        torch.testing.assert_close(whole[number], LowRank(rank=3).fit(WEIGHT[number], METRIC.of(number)).dense())
    monkeypatch.setattr("tdkit.decompositions.stacked.BATCH_BYTES", 1)
    torch.testing.assert_close(Stacked(each=LowRank(rank=3)).fit(WEIGHT, METRIC).stack(), whole)


def test_the_side_of_a_shared_factor_is_the_one_with_less_error() -> None:
    columns, rows = random(12, 2, seed=3), random(2, 8, seed=4)
    alike_inputs = random(4, 12, 2, seed=5) @ rows
    alike_outputs = columns @ random(4, 2, 8, seed=6)
    for weight, side in ((alike_inputs, "input"), (alike_outputs, "output")):
        best = Stacked(shared=True).best_within(weight, None, 2 * (4 * 12 + 8))
        assert isinstance(best, Stacked)
        assert best.side == side
        torch.testing.assert_close(best.fit(weight).dense(), weight.flatten(1))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_products_are_those_of_the_dense_stack(kind: Stacked) -> None:
    x, bias = random(sum(COUNTS), SHAPE[2], seed=7), random(SHAPE[0], SHAPE[1], seed=8)
    members = torch.tensor([e for e, count in enumerate(COUNTS) for _ in range(count)])
    for choice in choices(kind):
        matrix = choice.fit(WEIGHT)
        expected = torch.einsum("ni,noi->no", x, matrix.stack()[members])
        torch.testing.assert_close(dense_grouped(matrix.stack(), x, COUNTS, bias), expected + bias[members])
        for mode in ("training", "memory", "speed", "speed again"):
            if mode != "training":
                prepare(matrix, prefer="memory" if mode == "memory" else "speed")
            with torch.set_grad_enabled(mode == "training"):
                torch.testing.assert_close(matrix.grouped(x, COUNTS), expected)
                torch.testing.assert_close(matrix.grouped(x, COUNTS, bias), expected + bias[members])
                assert matrix.grouped(x[:0], (0,) * SHAPE[0], bias).shape == (0, SHAPE[1])


def test_a_cached_weight_is_used_where_it_is_faster_and_follows_the_factors() -> None:
    full = Stacked(each=LowRank(rank=64)).fit(random(2, 64, 64, seed=0).float())
    x = random(80, 64, seed=1).float()
    prepare(full, prefer="speed")
    with torch.no_grad():
        full.grouped(x, (40, 40))
        assert full.dispatcher.cached_bytes == 2 * 64 * 64 * 4
        assert isinstance(full, LowRankStack)
        full.left.mul_(2)
        torch.testing.assert_close(full.grouped(x, (40, 40)), dense_grouped(full.stack(), x, (40, 40)))
        prepare(full, prefer="memory")
        full.grouped(x, (40, 40))
        assert full.dispatcher.cached_bytes == 0


def test_members_leave_the_cache_to_the_stack() -> None:
    richest = Stacked(each=Kronecker()).complete((2, 64, 64), 2 * 64 * 64)
    assert richest is not None
    full = richest.fit(random(2, 64, 64, seed=0).float())
    x = random(80, 64, seed=1).float()
    prepare(full, prefer="speed")
    with torch.no_grad():
        for counts in ((40, 40), (79, 1), (80, 0)):
            torch.testing.assert_close(full.grouped(x, counts), dense_grouped(full.stack(), x, counts))
        assert full.dispatcher.cached_bytes == 2 * 64 * 64 * 4
        assert [part.dispatcher.cached_bytes for part in full.parts()] == [0, 0]
        full.parts()[0].tensors()[0].mul_(2)
        torch.testing.assert_close(full.grouped(x, (40, 40)), dense_grouped(full.stack(), x, (40, 40)))


def test_members_that_hooks_load_are_not_cached_in_a_stack() -> None:
    richest = Stacked(each=Kronecker()).complete((2, 64, 64), 2 * 64 * 64)
    assert richest is not None
    offloaded = prepare(richest.empty((2, 64, 64), device="meta"), prefer="speed")
    with torch.no_grad():
        assert offloaded.cached_stack(torch.randn(80, 64), (40, 40)) is None
    assert offloaded.dispatcher.cached_bytes == 0


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradients_are_right(kind: Stacked) -> None:
    choice = next(iter(choices(kind)))
    matrix = choice.fit(WEIGHT)
    x, bias = random(4, SHAPE[2], seed=7).requires_grad_(), random(SHAPE[0], SHAPE[1], seed=8).requires_grad_()
    names = [name for name, _ in matrix.named_parameters()]

    class Grouped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = matrix

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            result: Tensor = matrix.grouped(x, (1, 0, 2, 1), bias)
            return result

    def run(x: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        held = {f"matrix.{name}": factor for name, factor in zip(names, factors, strict=True)}
        result: Tensor = functional_call(Grouped(), held, (x, bias))
        return result

    torch.autograd.gradcheck(run, (x, bias, *(p.detach().clone().requires_grad_() for p in matrix.parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_dtypes_and_copies_are_kept(kind: Stacked, dtype: torch.dtype) -> None:
    x = random(sum(COUNTS), SHAPE[2], seed=7).to(dtype)
    for choice in choices(kind):
        matrix = choice.fit(WEIGHT.to(dtype))
        y = matrix.grouped(x, COUNTS)
        assert y.dtype == dtype
        assert torch.equal(copy.deepcopy(matrix).grouped(x, COUNTS), y)
        twin = choice.empty(SHAPE, device="cpu", dtype=dtype)
        twin.load_state_dict(matrix.state_dict())
        assert torch.equal(twin.grouped(x, COUNTS), y)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_options_round_trip(kind: Stacked) -> None:
    for choice in (kind, *choices(kind)):
        back = decomposition(json.loads(json.dumps(spec_of(choice))))
        assert back == choice
        assert hash(back) == hash(choice)
        assert back.describe() == choice.describe()
    assert spec_of(Stacked()) == {"stacked": {}}
    assert decomposition({"stacked": {"each": "kronecker"}}) == Stacked(each=Kronecker())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"each": {"low_rank": {"rank": 0}}}, r"stacked: each=\{'low_rank'.*rank=0 must be an integer of at least 1"),
        ({"each": "auto"}, r"stacked: each=auto\(.*must be a decomposition of matrices other than auto"),
        ({"each": Stacked()}, r"stacked: each=stacked\(low_rank\(\)\) must be"),
        ({"each": Kronecker(), "shared": True}, r"stacked: shared=True needs each=low_rank, not kronecker\(\)"),
        ({"shared": "yes"}, r"stacked: shared='yes' must be true or false"),
        ({"side": "input"}, r"stacked: side='input' must be 'input' or 'output', with shared=True"),
        ({"shared": True, "side": "left"}, r"stacked: side='left' must be 'input' or 'output'"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Stacked(**options)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(OptionError, match=r"stacked takes weights of 3 dimensions, not a 12x8 one"):
        Stacked().shape_of((12, 8))
    with pytest.raises(OptionError, match=r"low_rank: rank=9 is above the full rank 8"):
        Stacked(each=LowRank(rank=9)).check(SHAPE)
    with pytest.raises(OptionError, match=r"rank=9 of one shared factor exceeds 8, the rank of 4x12x8"):
        Stacked(each=LowRank(rank=9), shared=True, side="input").check(SHAPE)
    for choice in (Stacked(), Stacked(each=LowRank(rank=2), shared=True)):
        with pytest.raises(OptionError, match=r"give a rank, and a side of a shared factor, or a budget"):
            choice.fit(WEIGHT)
    with pytest.raises(OptionError, match=r"the input moment of 4x12x8 members must be 4x8x8, not 8x8"):
        Stacked(each=LowRank(rank=2)).fit(WEIGHT, Metric(METRIC.of(0).input))


def test_a_rule_stands_for_its_decomposition_at_each_member() -> None:
    assert stacked(LowRank(rank=2)) == Stacked(each=LowRank(rank=2))
    assert stacked(Stacked(shared=True)) == Stacked(shared=True)
    every = stacked(Auto(among=(LowRank(), Kronecker())))
    assert isinstance(every, Auto)
    assert every.members == (
        Stacked(),
        Stacked(shared=True, side="input"),
        Stacked(shared=True, side="output"),
        Stacked(each=Kronecker()),
    )
    assert [kind.family for kind in every.members] == ["low_rank", "low_rank", "low_rank", "kronecker"]
    common = random(4, 12, 2, seed=5) @ random(2, 8, seed=4)
    assert every.best_within(common, None, 150) == Stacked(each=LowRank(rank=2), shared=True, side="input")
    alone = random(4, 12, 2, seed=5) @ random(4, 2, 8, seed=4)
    assert every.best_within(alone, None, 160) == Stacked(each=LowRank(rank=2))
    products = torch.stack([torch.kron(random(3, 4, seed=n), random(4, 2, seed=n + 9)) for n in range(4)])
    of_products = stacked(Auto(among=(LowRank(), Kronecker(a=(3, 4)))))
    assert of_products.best_within(products, None, 100) == Stacked(each=Kronecker(terms=1, a=(3, 4), b=(4, 2)))


def test_a_decomposition_of_stacks_is_refused_for_other_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Conv1d(8, 8, 3))
    with pytest.raises(OptionError, match=r"is for stacks of matrices, such as experts; this weight is none"):
        compress(model, Policy([Rule("1", Stacked())], budget=0.9))
