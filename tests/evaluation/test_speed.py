"""The benchmark compares like with like, changes nothing, and its clock and byte counts are right."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import Kronecker, LowRank, Policy, Rule, TTMatrix
from tdkit.errors import PolicyError
from tdkit.evaluation.speed import WHOLE_MODEL, benchmark, densified, unfitted
from tdkit.evaluation.timing import Timing, peak_bytes, saved_bytes, side_by_side
from tdkit.models.hosts.base import FactorizedLayer
from tdkit.models.preparation import cached_bytes
from tdkit.models.sites import num_params
from tdkit.support.tables import render


class Tied(nn.Module):
    """An embedding whose rows are also the head, with a layer in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24, padding_idx=0)
        self.middle = nn.Linear(24, 24)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(ids)).tanh())


def compressed() -> nn.Module:
    torch.manual_seed(0)
    rules = [Rule("middle", TTMatrix(ranks=3)), Rule("*", LowRank(rank=6))]
    return tdkit.compress(Tied(), Policy(rules), progress=False)


def call(model: nn.Module, tokens: int) -> object:
    return model(torch.arange(tokens).remainder(40).unsqueeze(0))


def test_the_dense_twin_gives_the_same_outputs_and_keeps_ties() -> None:
    model = compressed()
    dense = densified(model)
    assert not any(isinstance(module, FactorizedLayer) for module in dense.modules())
    assert dense.head.weight is dense.embed.weight
    assert num_params(dense) == num_params(Tied())
    torch.testing.assert_close(call(dense, 9), call(model, 9))


@pytest.mark.parametrize("train", [False, True])
def test_every_kind_of_layer_and_the_model_are_timed(train: bool) -> None:
    model = compressed()
    model.middle.matrix.dispatcher.configure("memory")
    result = benchmark(model, tokens=(1, 8), train=train, call=call, seconds=0.01, progress=False)
    assert {row.what.split()[0] for row in result.rows} == {"Embedding", "Linear", "whole"}
    assert [row.tokens for row in result.rows] == [1, 8] * 4
    if not train:
        whole = [row for row in result.rows if row.what == WHOLE_MODEL]
        outputs = [row.tokens * 40 * 4 for row in whole]  # bytes of the logits, of which each call makes one tensor
        assert all(row.peak_bytes > output for row, output in zip(whole, outputs, strict=True))
        assert whole[1].dense_peak_bytes > whole[0].dense_peak_bytes
    assert json.loads(json.dumps(result.to_dict()))["train"] is train
    shown = render(result.table(), 200)
    assert WHOLE_MODEL in shown
    assert "low_rank(rank=6)" in shown
    assert model.training
    assert cached_bytes(model) == 0
    assert model.middle.matrix.prefer == "memory"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_row_tells_the_times_of_its_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def timed(contenders: dict[str, Callable[[], object]], **_: object) -> dict[str, Timing]:
        outputs = [each() for each in contenders.values()]
        torch.testing.assert_close(outputs[0], outputs[1])
        seen.append(list(contenders))
        return {"dense": Timing(2.0, 1.0), "factorised": Timing(3.0, 1.25)}

    monkeypatch.setattr("tdkit.evaluation.speed.side_by_side", timed)
    result = benchmark(compressed(), tokens=(1, 8), call=call, progress=False)
    assert seen == [["dense", "factorised"]] * len(result.rows)
    assert {(row.dense_seconds, row.seconds, row.ratio) for row in result.rows} == {(2.0, 3.0, 1.25)}


def test_a_dense_model_is_refused_with_the_remedy() -> None:
    with pytest.raises(PolicyError, match="no factorised layer: compress it, or give a policy"):
        benchmark(Tied())


def test_a_plan_is_tried_without_a_fit() -> None:
    model = Tied()
    plan = tdkit.plan(model, Policy([Rule("*", Kronecker())], budget=0.7))
    unfitted(model, plan)
    assert num_params(model) == plan.params_after
    assert torch.isfinite(call(model, 5)).all()


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_convolutions_are_timed_on_images(train: bool) -> None:
    layers = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, groups=4), nn.ConvTranspose2d(16, 8, 3)
    model = nn.Sequential(*layers)
    unfitted(model, tdkit.plan(model, Policy([Rule("*", LowRank(rank=2))])))
    result = benchmark(model, tokens=(1, 100), train=train, seconds=0.01, progress=False)
    assert [row.what for row in result.rows[::2]] == [
        "Conv2d 16x8x3x3, stride 2x2 low_rank(rank=2)",
        "Conv2d 16x4x3x3, 4 groups low_rank(rank=2)",
        "ConvTranspose2d 8x16x3x3 low_rank(rank=2)",
    ]
    assert {row.path for row in result.rows} <= {"chain", "dense", "dense, cached"}
    assert result.rows[1].dense_peak_bytes > result.rows[0].dense_peak_bytes
    assert result.skipped == ()


class Clock:
    """Goes on only when a call takes its time, and is twice as slow in every second round, as a busy machine is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds * (1 + self.calls // 2 % 2)
            self.calls += 1

        return call


def test_calls_are_compared_within_the_same_round() -> None:
    clock = Clock()
    calls = {"first": clock.taking(0.25), "second": clock.taking(0.75)}
    timings = side_by_side(calls, seconds=0.01, min_rounds=5, clock=clock)
    assert timings["first"].ratio == 1.0
    assert timings["second"].ratio == 3.0
    assert timings["second"].seconds == pytest.approx(3 * timings["first"].seconds)
    assert clock.calls == 2 * (1 + 5), "a warm-up and the rounds asked for"


def test_what_is_prepared_and_the_call_after_it_are_not_timed() -> None:
    clock = Clock()
    clock.calls = -(10**9)  # never slow
    slow = False

    def prepare() -> None:
        nonlocal slow
        slow, clock.now = True, clock.now + 5.0

    def call() -> None:
        nonlocal slow
        slow, clock.now = False, clock.now + (2.0 if slow else 0.25)

    timings = side_by_side({"alone": call, "prepared": call}, min_rounds=5, clock=clock, prepare={"prepared": prepare})
    assert timings["alone"].seconds == timings["prepared"].seconds == 0.25


def test_short_calls_are_repeated_within_a_sample_and_rounds_go_on_for_the_time_given() -> None:
    clock = Clock()
    clock.calls = -(10**9)  # never slow
    times: list[float] = []

    def short() -> None:
        clock.now += 1e-3
        times.append(clock.now)

    assert side_by_side({"short": short}, seconds=1.0, clock=clock)["short"].seconds == pytest.approx(1e-3)
    warm_up, per_sample = 1 + 3 + 3, 1 + 5
    assert (len(times) - warm_up) % per_sample == 0
    assert clock.now >= 1.0


def test_bytes_saved_and_at_the_peak() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    assert saved_bytes(lambda: (x * 2).sin().cos()) == 2 * 64 * 32 * 4
    assert peak_bytes(lambda: x.detach() + 1) == 64 * 32 * 4

    def three_at_once() -> Tensor:
        first = x.detach() + 1
        return (first + 1) * first

    assert peak_bytes(three_at_once) == 3 * 64 * 32 * 4

    def one_after_another() -> None:
        for _ in range(5):
            x.detach().clone()

    assert peak_bytes(one_after_another) == 64 * 32 * 4


FAULTS = """
import resource
import torch
from tdkit.evaluation.timing import keep_freed_memory

kept = {}
for round in range(20):
    if round == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    together = [torch.empty(2**20).zero_() for _ in range(5)]  # 20 MiB
    del together
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_tensors() -> None:
    fresh = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # at most: not left to its history
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | fresh

    def faults(kept: str) -> tuple[int, int]:
        code = FAULTS.format(kept)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        kept_at_all, count = map(int, done.stdout.split())
        return kept_at_all, count

    _, by_default = faults("False")
    assert by_default >= 50, "each tensor lies in fresh pages"
    kept, count = faults("keep_freed_memory()")
    assert kept
    assert count < min(100, by_default / 10)
