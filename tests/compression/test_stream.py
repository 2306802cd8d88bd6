"""Compression of a folder layer by layer: the same files as in memory, goes on after a kill, shared by processes."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tdkit
from tdkit import Auto, Kronecker, LowRank, PermutedKronecker, Policy, Rule, compress_folder
from tdkit.compression import stream
from tdkit.compression import work as work_of
from tdkit.compression.fit import fit_step
from tdkit.compression.work import Work
from tdkit.errors import BudgetError, CheckpointError, OptionError, PolicyError, SourceError
from tdkit.sources.models import load_model
from tests.compression.streaming import contents, start, write_folder
from tests.conftest import make_gpt2, make_llama

POLICIES = {
    "plain": Policy([Rule("*.mlp.*", LowRank())], budget=0.9),
    "tied": Policy([Rule("transformer.wte", Kronecker()), Rule("*", LowRank())], budget=0.7),
    "kept": Policy([Rule("*", keep=True)]),
    "permuted": Policy([Rule("transformer.wte", PermutedKronecker(terms=1))]),
    "chosen": Policy([Rule("*.mlp.*", Auto(among=("low_rank", "kronecker")))], budget=0.9),
}


def in_memory(source: Path, policy: Any, out: Path, *, calibration: Any = None, dtype: Any = torch.bfloat16) -> Path:
    loaded = load_model(str(source), dtype=dtype)
    tdkit.compress(loaded.model, policy, calibration=calibration)
    return tdkit.save(loaded.model, out, tokenizer=loaded.tokenizer)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_folder(make_gpt2(pad_token_id=0), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def calibration() -> tdkit.Calibration:
    torch.manual_seed(0)
    return tdkit.calibrate(make_gpt2(pad_token_id=0), [torch.randint(0, 60, (2, 16)) for _ in range(3)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_folder_is_the_one_that_save_writes(name: str, dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    expected = in_memory(source, POLICIES[name], tmp_path / "memory", dtype=dtype)
    found = compress_folder(source, POLICIES[name], tmp_path / "streamed", dtype=dtype)
    assert contents(found) == contents(expected)
    assert [path.name for path in tmp_path.iterdir() if path not in (expected, found)] == []


@pytest.mark.parametrize("name", ["plain", "tied", "chosen"])
def test_saved_moments_give_the_same_too(
    name: str, source: Path, calibration: tdkit.Calibration, tmp_path: Path
) -> None:
    expected = in_memory(source, POLICIES[name], tmp_path / "memory", calibration=calibration)
    moments = calibration.save(tmp_path / "moments")
    for given in (calibration, moments):
        found = compress_folder(source, POLICIES[name], tmp_path / "streamed", calibration=given, overwrite=True)
        assert contents(found) == contents(expected)


def test_a_plan_is_followed(source: Path, tmp_path: Path) -> None:
    plan = tdkit.plan(load_model(str(source)).model, POLICIES["plain"])
    expected = compress_folder(source, POLICIES["plain"], tmp_path / "policy")
    assert contents(compress_folder(source, plan, tmp_path / "plan")) == contents(expected)


def test_outputs_are_those_of_the_model_in_memory(source: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    loaded = load_model(str(source), dtype=torch.float32).model
    tdkit.compress(loaded, POLICIES["tied"])
    streamed = tdkit.load(compress_folder(source, POLICIES["tied"], tmp_path / "out", dtype=torch.float32))
    assert torch.equal(streamed(ids).logits, loaded(ids).logits)


def test_no_more_than_one_layer_is_in_memory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def noted(*args: Any, **options: Any) -> Any:
        opened.append(open_model(*args, **options))
        return opened[0]

    open_model = stream.open_model
    monkeypatch.setattr(stream, "open_model", noted)
    compress_folder(source, POLICIES["plain"], tmp_path / "out")
    weights = opened[0].weights
    assert weights.held_bytes == 0
    assert weights.peak_bytes == 2 * 32 * 128  # the largest weight that is rewritten, in bfloat16


def test_it_goes_on_where_it_was_interrupted(
    source: Path, calibration: tdkit.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments, out, fitted = calibration.save(tmp_path / "moments"), tmp_path / "out", []

    def interrupted(step: Any, *args: Any) -> Any:
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(step.name)
        return fit_step(step, *args)

    monkeypatch.setattr(stream, "fit_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress_folder(source, POLICIES["tied"], out, calibration=moments)
    assert not out.exists()
    again = []

    def noted(step: Any, *args: Any) -> Any:
        again.append(step.name)
        return fit_step(step, *args)

    monkeypatch.setattr(stream, "fit_step", noted)
    monkeypatch.setattr(stream, "planned", None)  # the plan is kept
    compress_folder(source, POLICIES["tied"], out, calibration=moments)
    assert not set(fitted) & set(again)
    assert again
    expected = in_memory(source, POLICIES["tied"], tmp_path / "memory", calibration=calibration)
    assert contents(out) == contents(expected)


@pytest.fixture
def unfinished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder of an interrupted run of the plain policy."""

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stream, "fit_step", stop)
        with pytest.raises(KeyboardInterrupt):
            compress_folder(source, POLICIES["plain"], tmp_path / "out")
    return tmp_path / "out"


def test_another_job_does_not_go_on_with_it(
    source: Path, calibration: tdkit.Calibration, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Policy([Rule("*.mlp.*", LowRank())], budget=0.8)
    with pytest.raises(CheckpointError, match=r"unfinished work of a call whose policy differed.*delete the folder"):
        compress_folder(source, other, unfinished)
    with pytest.raises(CheckpointError, match="whose calibration differed"):
        compress_folder(source, POLICIES["plain"], unfinished, calibration=calibration)
    with pytest.raises(CheckpointError, match="whose dtype differed"):
        compress_folder(source, POLICIES["plain"], unfinished, dtype=torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr("tdkit.compression.work.VERSION", "0.0.0")
        with pytest.raises(CheckpointError, match="whose version differed"):
            compress_folder(source, POLICIES["plain"], unfinished)
    os.utime(source / "config.json")
    with pytest.raises(CheckpointError, match="whose source differed"):
        compress_folder(source, POLICIES["plain"], unfinished)
    assert not unfinished.exists()


def test_a_damaged_layer_is_told(source: Path, unfinished: Path) -> None:
    Work(unfinished).layer(0).write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"000000\.safetensors is damaged.*delete it, and it is fitted again"):
        compress_folder(source, POLICIES["plain"], unfinished)
    Work(unfinished).layer(0).unlink()
    assert tdkit.load(compress_folder(source, POLICIES["plain"], unfinished)) is not None


SLOW = """
import sys, time, torch
from tdkit import LowRank, Policy, Rule, compress_folder
from tdkit.compression import stream
from tdkit.compression import work as work_of
torch.set_num_threads(1)
fit, seconds = stream.fit_step, float(sys.argv[3])
def slow(*args):
    time.sleep(seconds)
    return fit(*args)
stream.fit_step = slow
compress_folder(sys.argv[1], Policy([Rule("*.mlp.*", LowRank())], budget=0.9), sys.argv[2], workers=int(sys.argv[4]))
"""


def wait_for_layers(out: Path, count: int, process: Any) -> None:
    layers = Work(out).folder / "layers"
    while len(list(layers.glob("*.safetensors"))) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_it_goes_on_after_a_kill_in_the_middle_of_a_layer(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = start(SLOW, source, out, 0.3, 1)
    wait_for_layers(out, 2, killed)
    killed.kill()
    killed.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in (Work(out).folder / "layers").glob("*.safetensors")}
    assert 2 <= len(done) < 8
    assert not out.exists()
    before = [path.stat().st_mtime_ns for path in map(Work(out).layer, range(2))]
    compress_folder(source, POLICIES["plain"], out)
    assert before == [done[f"{number:06}.safetensors"] for number in range(2)]
    assert contents(out) == contents(in_memory(source, POLICIES["plain"], tmp_path / "memory"))


def test_two_calls_share_the_layers(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = start(SLOW, source, out, 0.2, 1)
    wait_for_layers(out, 1, other)
    compress_folder(source, POLICIES["plain"], out)
    _, errors = other.communicate(timeout=200)
    assert other.returncode == 0, errors
    assert contents(out) == contents(in_memory(source, POLICIES["plain"], tmp_path / "memory"))
    assert not Work(out).folder.exists()


WAITING = """
import sys, time, torch
from pathlib import Path
from tdkit import LowRank, Policy, Rule, compress_folder
from tdkit.compression import stream
from tdkit.compression import work as work_of
torch.set_num_threads(1)
fit = stream.fit_step
def waiting(*args):
    while not Path(sys.argv[3]).exists():
        time.sleep(0.02)
    return fit(*args)
stream.fit_step = waiting
compress_folder(sys.argv[1], Policy([Rule("*.mlp.*", LowRank())], budget=0.9), sys.argv[2], workers=2)
"""


def test_a_killed_worker_is_told_and_the_others_go_on(source: Path, tmp_path: Path) -> None:
    """The call waits in its first layer until its worker has done others and was killed."""
    out, go = tmp_path / "out", tmp_path / "go"
    started = start(WAITING, source, out, go)
    wait_for_layers(out, 1, started)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    go.touch()
    _, errors = started.communicate(timeout=200)
    assert started.returncode == 0, errors
    assert "a worker stopped with exit code -9; the others did its layers" in errors
    assert contents(out) == contents(in_memory(source, POLICIES["plain"], tmp_path / "memory"))


def test_workers_give_the_same(source: Path, calibration: tdkit.Calibration, tmp_path: Path) -> None:
    expected = compress_folder(source, POLICIES["tied"], tmp_path / "one", calibration=calibration)
    found = compress_folder(source, POLICIES["tied"], tmp_path / "two", calibration=calibration, workers=2)
    assert contents(found) == contents(expected)


def test_what_cannot_be_done_is_told_before_any_work(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="workers=0 must be an integer of at least 1"):
        compress_folder(source, POLICIES["plain"], out, workers=0)
    with pytest.raises(SourceError, match="'smollm2' is a registered model, which is loaded as a whole"):
        compress_folder("smollm2", POLICIES["plain"], out)
    with pytest.raises(PolicyError, match="matched no layer"):
        compress_folder(source, Policy([Rule("transfomer.*", LowRank(rank=2))]), out)
    with pytest.raises(PolicyError, match=r"predicate \(where=\), which cannot be written"):
        compress_folder(source, Policy([Rule("*", LowRank(rank=2), where=lambda site: True)]), out)
    with pytest.raises(BudgetError, match="cannot be met"):
        compress_folder(source, Policy([Rule("*.mlp.c_fc", LowRank())], budget=0.1), out)
    assert not Work(out).folder.exists()
    compressed = compress_folder(source, POLICIES["plain"], out)
    with pytest.raises(CheckpointError, match="compress the dense model"):
        compress_folder(compressed, POLICIES["plain"], tmp_path / "again")
    with pytest.raises(CheckpointError, match="pass overwrite=True"):
        compress_folder(source, POLICIES["plain"], out)
    assert not Work(out).folder.exists()


def test_the_warnings_of_the_plan_are_logged(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tdkit"):
        compress_folder(source, Policy([Rule("*.mlp.*", LowRank(rank=1))]), tmp_path / "out")
    assert "cut below a tenth" in caplog.text


def test_weights_that_hold_nan_are_told(tmp_path: Path) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    source = write_folder(model, tmp_path / "source")
    for workers in (1, 2):
        with pytest.raises(PolicyError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN"):
            compress_folder(source, Policy([Rule("*.mlp.*", LowRank(rank=2))]), tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()


MEMORY = """
import resource, sys, torch
from tdkit import LowRank, Policy, Rule, compress_folder
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
fit = Policy([Rule("*.o_proj", LowRank(rank=8))])
if len(sys.argv) > 3:  # once before, for what stays in memory of the libraries
    compress_folder(sys.argv[3], fit, sys.argv[2], overwrite=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compress_folder(sys.argv[1], fit, sys.argv[2], overwrite=True)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 8192, "vocab_size": 512, "num_attention_heads": 4}
    small = write_folder(make_llama(**sizes, num_hidden_layers=1), tmp_path / "small", shard="10MB")
    large = write_folder(make_llama(**sizes, num_hidden_layers=12), tmp_path / "large", shard="40MB")
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 150e6
    done = start(MEMORY, large, tmp_path / "out", small)
    printed, errors = done.communicate()
    assert done.returncode == 0, errors
    assert int(printed) < size / 3


def test_a_call_that_others_have_finished_ends_as_they_did(
    source: Path, calibration: tdkit.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is done and removed between two steps of the slower process, at each of them."""
    expected = compress_folder(source, POLICIES["chosen"], tmp_path / "alone", calibration=calibration)
    plans: list[Any] = []
    once = Work.once

    def overtaken(work: Work, name: str, make: Any) -> Path:
        monkeypatch.setattr(Work, "once", once)
        if name != after:
            monkeypatch.setattr(Work, "once", overtaken)
            return once(work, name, make)
        compress_folder(source, POLICIES["chosen"], out, calibration=calibration, on_plan=plans.append)
        return once(work, name, make)

    for after in ("plan.json", "saved"):
        out = tmp_path / after
        monkeypatch.setattr(Work, "once", overtaken)
        compress_folder(source, POLICIES["chosen"], out, calibration=calibration, on_plan=plans.append)
        assert contents(out) == contents(expected)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(after)) == [after]
    assert len({str(plan) for plan in plans}) == 1
    assert len(plans) == 4


def test_work_that_is_removed_while_another_begins_is_begun_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, turns = work_of.claimed, []

    def claimed(path: Path, *, wait: bool) -> Any:
        if path.name == "job.lock" and not turns:
            turns.append(path)
            path.parent.rmdir()
        return original(path, wait=wait)

    monkeypatch.setattr(work_of, "claimed", claimed)
    compress_folder(source, POLICIES["plain"], tmp_path / "out")
    assert turns
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
