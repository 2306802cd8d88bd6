"""Killed at any moment and started again, a run ends with the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_models import gpt2, ids, same_weights
from launch import started

from tdkit_distill import distill
from tdkit_distill.errors import InterruptedRun, ResumeError, StorageError
from tdkit_distill.loop.checkpoints import checkpoints

STAGE = {"losses": {"logits": 1}, "steps": 8, "batch_size": 4, "optimizer": {"lr": 1e-2}}


def weights(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(f"{path}.pt", weights_only=True)
    return loaded


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps(folder: Path) -> int:
    """How many lines the log of a run has."""
    path = folder / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_killed_again_and_again(tmp_path: Path) -> None:
    with started("run_distillation.py", "-", tmp_path / "undisturbed") as undisturbed:
        _, message = undisturbed.communicate()
    assert undisturbed.returncode == 0, message
    chance = random.Random(0)
    for _ in range(3):
        goal = chance.randint(1, 6) + steps(tmp_path / "run")
        with started("run_distillation.py", tmp_path / "run", tmp_path / "killed", 12, 0.04) as run:
            while steps(tmp_path / "run") < goal:
                assert run.poll() is None
                time.sleep(0.02)
            time.sleep(chance.random() * 0.1)
            run.kill()
    with started("run_distillation.py", tmp_path / "run", tmp_path / "killed", 12) as run:
        _, message = run.communicate()
    assert run.returncode == 0, message
    assert equal(weights(tmp_path / "undisturbed"), weights(tmp_path / "killed"))
    assert json.loads((tmp_path / "killed.json").read_text())["resumed_at"] > 0
    whole = json.loads((tmp_path / "undisturbed.json").read_text())["losses"]
    assert json.loads((tmp_path / "killed.json").read_text())["losses"] == whole
    names = [p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert set(names) == {".safetensors", ".json", ".jsonl"}, "nothing in a checkpoint is pickled"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_leaves_with_a_message(name: str, tmp_path: Path) -> None:
    with started("run_distillation.py", tmp_path / "run", tmp_path / "x", 200, 0.02) as run:
        while not steps(tmp_path / "run"):
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.Signals[name])
        _, message = run.communicate()
    assert run.returncode == 1
    assert f"stopped by {name} after" in message
    assert "run again to go on" in message
    done = int(message.split("after ")[1].split()[0])
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{done:08d}"


def test_a_second_ctrl_c_stops_at_once_and_is_told_by_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    calls = 0

    def call(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return model(batch["input_ids"])

    with pytest.raises(KeyboardInterrupt):
        distill(gpt2(1, seed=1), gpt2(), STAGE, ids(), call=call, progress=True)
    assert calls == 6
    assert "SIGINT: stopping after this step (Ctrl-C to stop at once and lose it)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stop_in_the_process_itself_is_exact(tmp_path: Path) -> None:
    undisturbed, student = gpt2(1, seed=1, dropout=0.1), gpt2(1, seed=1, dropout=0.1)
    distill(undisturbed, gpt2(), STAGE, ids())

    def stop_at(step: int) -> Any:
        calls = 0

        def call(model: Any, batch: Any) -> Any:
            nonlocal calls
            calls += model is student
            if calls == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return model(batch["input_ids"])

        return call

    before = signal.getsignal(signal.SIGTERM)
    for step in (3, 4):
        with pytest.raises(InterruptedRun):
            distill(student, gpt2(), STAGE, ids(), folder=tmp_path, call=stop_at(step))
        student = gpt2(1, seed=1, dropout=0.1)
    assert signal.getsignal(signal.SIGTERM) is before
    result = distill(student, gpt2(), STAGE, ids(), folder=tmp_path)
    assert 0 < result.resumed_at < 8
    assert same_weights(undisturbed, student)
    again = gpt2(1, seed=1, dropout=0.1)
    assert distill(again, gpt2(), STAGE, ids(), folder=tmp_path).resumed_at == 8
    assert same_weights(undisturbed, again)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    undisturbed, student = gpt2(1, seed=1), gpt2(1, seed=1)
    distill(undisturbed, gpt2(), STAGE, ids(), folder=tmp_path, running={"checkpoint_every": 2})
    latest, earlier = checkpoints(tmp_path)[-1], checkpoints(tmp_path)[-2]
    data = bytearray((latest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (latest / "model.safetensors").write_bytes(bytes(data))
    result = distill(student, gpt2(), STAGE, ids(), folder=tmp_path)
    assert result.resumed_at == 6
    assert same_weights(undisturbed, student)
    for place in (latest, earlier):
        (place / "state.json").write_text("{")
    with pytest.raises(ResumeError, match=r"every checkpoint .* is damaged"):
        distill(gpt2(1, seed=1), gpt2(), STAGE, ids(), folder=tmp_path)


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    distill(gpt2(1, seed=1), gpt2(), STAGE, ids(), folder=tmp_path)
    for student, teacher, stage in (
        (gpt2(1, seed=2), gpt2(), STAGE),
        (gpt2(1, seed=1), gpt2(seed=4), STAGE),
        (gpt2(1, seed=1), gpt2(), {**STAGE, "steps": 9}),
    ):
        with pytest.raises(ResumeError, match="holds a run with other models, data or stages"):
            distill(student, teacher, stage, ids(), folder=tmp_path)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    student = gpt2(1, seed=1)
    calls = 0

    def call(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += model is student
        if calls == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        return model(batch["input_ids"])

    try:
        with pytest.raises(StorageError, match=r"could not be written: .*the last good one is .*step-00000003"):
            distill(student, gpt2(), STAGE, ids(), folder=tmp_path, running={"checkpoint_every": 3}, call=call)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step-00000003"]
    undisturbed, again = gpt2(1, seed=1), gpt2(1, seed=1)
    distill(undisturbed, gpt2(), STAGE, ids())
    assert distill(again, gpt2(), STAGE, ids(), folder=tmp_path).resumed_at == 3
    assert same_weights(undisturbed, again)
