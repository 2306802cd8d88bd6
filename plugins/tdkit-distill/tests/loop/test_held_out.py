"""Stages keep their best weights by held-out rows and end early, also when they are interrupted and go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_models import gpt2, ids, same_weights, text

from tdkit_distill import Windows, distill
from tdkit_distill.errors import InterruptedRun, ResumeError, StageError
from tdkit_distill.loop.checkpoints import checkpoints

# Random rows have nothing to learn, so that the loss on other ones rises: the best weights are early ones.
STAGE: dict[str, Any] = {
    "losses": {"cross_entropy": 1},
    "steps": 12,
    "batch_size": 4,
    "optimizer": {"lr": 3e-2},
    "schedule": {"kind": "constant"},
    "keep": "best",
}
EVERY = {"evaluate_every": 2}


def sets() -> dict[str, Windows]:
    return {"first": Windows(ids(8, seed=11)), "other": Windows(text(8))}


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [entry["held_out"] for entry in history if "held_out" in entry]


def test_the_best_weights_are_kept() -> None:
    student = gpt2(1)
    done = distill(student, None, STAGE, ids(), held_out=sets(), running=EVERY)
    found = losses(done.history)
    assert len(found) == 7, "before the first step, every two steps, and at the end"
    best = min(range(7), key=found.__getitem__)
    assert best < 6, "the case is one in which training does harm"
    assert done.held_out == found[best]
    shorter = gpt2(1)
    if best:
        distill(shorter, None, {**STAGE, "keep": "last", "steps": 2 * best}, ids())
    assert same_weights(student, shorter)
    assert all(set(entry["others"]) == {"other"} for entry in done.history if "held_out" in entry)


def test_a_stage_ends_when_it_gets_no_better() -> None:
    student = gpt2(1)
    done = distill(student, None, {**STAGE, "steps": 100, "patience": 2}, ids(), held_out=sets(), running=EVERY)
    found = losses(done.history)
    best = min(range(len(found)), key=found.__getitem__)
    assert len(found) == best + 3
    assert done.steps == 2 * (len(found) - 1) < 100
    assert done.tokens == done.steps * 4 * 8


def test_learning_goes_to_the_end() -> None:
    stage = {**STAGE, "patience": 2, "optimizer": {"lr": 1e-2}}
    done = distill(gpt2(1), None, stage, text(64), held_out=Windows(text(8)), running=EVERY)
    found = losses(done.history)
    assert found == sorted(found, reverse=True)
    assert done.held_out == found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("step", [1, 5, 8])
def test_an_interrupted_stage_has_its_best_weights_and_ends_with_those_of_an_undisturbed_one(
    step: int, tmp_path: Path
) -> None:
    undisturbed, student = gpt2(1), gpt2(1)
    whole = distill(undisturbed, None, STAGE, ids(), held_out=sets(), running=EVERY)
    calls = 0

    def stopping(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += model.training
        if calls == step and model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return model(batch["input_ids"])

    every = {**EVERY, "checkpoint_every": 3, "keep": 1}
    with pytest.raises(InterruptedRun) as raised:
        distill(student, None, STAGE, ids(), held_out=sets(), running=every, folder=tmp_path, call=stopping)
    so_far = losses(raised.value.history)
    best = min(range(len(so_far)), key=so_far.__getitem__)
    reached = gpt2(1)
    if best:
        distill(reached, None, {**STAGE, "keep": "last", "steps": 2 * best}, ids())
    assert same_weights(student, reached)
    again = gpt2(1)
    done = distill(again, None, STAGE, ids(), held_out=sets(), running=every, folder=tmp_path)
    assert done.resumed_at == step
    assert losses(done.history) == losses(whole.history)
    assert same_weights(again, undisturbed)
    assert not list(tmp_path.glob("best-*")), "the finished stage's checkpoint has them"
    clocks = [entry["clock"] for entry in done.history]
    assert clocks == sorted(clocks)


def test_missing_best_weights_are_told(tmp_path: Path) -> None:
    def stopping(model: Any, batch: Any) -> Any:
        if model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return model(batch["input_ids"])

    with pytest.raises(InterruptedRun):
        distill(gpt2(1), None, STAGE, ids(), held_out=sets(), running=EVERY, folder=tmp_path, call=stopping)
    assert len(checkpoints(tmp_path)) == 1
    (best,) = tmp_path.glob("best-*")
    (best / "state.json").unlink()
    with pytest.raises(ResumeError, match=r"best weights in .* cannot be read"):
        distill(gpt2(1), None, {**STAGE}, ids(), held_out=sets(), running=EVERY, folder=tmp_path)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(StageError, match=r"keep='best' is measured on held-out rows: pass held_out="):
        distill(gpt2(1), None, STAGE, ids())
    with pytest.raises(StageError, match=r"patience=2 is for keep='best'"):
        distill(gpt2(1), None, {**STAGE, "keep": "last", "patience": 2}, ids(), held_out=sets())


def test_rates_by_kind_of_parameter_and_what_is_left_out() -> None:
    student = gpt2(1)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    stage = {
        **{"losses": {"cross_entropy": 1}, "steps": 1, "batch_size": 4},
        **{"trainable": ("all", "!embeddings"), "clip": None},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "scale": {"norms": 0.5, "*.mlp.*": 2.0}},
    }
    distill(student, None, stage, ids())
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in student.named_parameters()}
    # the first step of Adam is of the size of its learning rate
    assert moved["transformer.wte.weight"] == moved["transformer.wpe.weight"] == 0
    assert moved["transformer.h.0.ln_1.weight"] == pytest.approx(5e-4, rel=1e-2)
    assert moved["transformer.h.0.mlp.c_fc.weight"] == pytest.approx(2e-3, rel=1e-2)
    assert moved["transformer.h.0.attn.c_proj.weight"] == pytest.approx(1e-3, rel=1e-2)


def test_patterns_that_select_nothing_are_told() -> None:
    stage = {"losses": {"cross_entropy": 1}, "steps": 1}
    with pytest.raises(StageError, match=r"optimizer\.scale 'norm' selects no parameter; did you mean 'norms'"):
        distill(gpt2(1), None, {**stage, "optimizer": {"scale": {"norm": 0.5}}}, ids())
    with pytest.raises(StageError, match="leaves no parameter to train"):
        distill(gpt2(1), None, {**stage, "trainable": ("embeddings", "!embeddings")}, ids())


def test_the_best_of_the_second_stage_is_its_own() -> None:
    student = gpt2(1)
    stages = [{**STAGE, "name": "one", "steps": 4}, {**STAGE, "name": "two", "steps": 4}]
    done = distill(student, None, stages, ids(), held_out=sets(), running=EVERY)
    second = [entry for entry in done.history if "held_out" in entry and entry["number"] == 1]
    assert [entry["total"] for entry in second] == [4, 6, 8]
    first = [entry["held_out"] for entry in done.history if "held_out" in entry and entry["number"] == 0]
    assert second[0]["held_out"] == pytest.approx(min(first), rel=1e-6)
    assert done.held_out == min(entry["held_out"] for entry in second)
    assert torch.isfinite(torch.tensor(done.held_out))
