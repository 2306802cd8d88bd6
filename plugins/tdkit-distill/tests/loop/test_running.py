"""How a run goes: precision, device and trackers do what they say or are refused with the remedy."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from distill_models import factorized, gpt2, ids
from tdkit.support.compatibility import reset_accelerate_state

from tdkit_distill import distill
from tdkit_distill.errors import StageError
from tdkit_distill.loop.acceleration import check_accelerator
from tdkit_distill.loop.stages import Running


@pytest.fixture(autouse=True)
def _accelerate_as_new() -> Iterator[None]:
    """What one test makes accelerate remember is gone in the next."""
    yield
    reset_accelerate_state(processes=True)


LOSSES = {"logits": {"temperature": 2.0}, "hidden": 0.5, "cross_entropy": 1.0}
STAGE = {"losses": LOSSES, "steps": 4, "batch_size": 4, "optimizer": {"lr": 1e-2}}


def test_bf16_autocast_on_a_cpu_trains_float32_factors() -> None:
    exact = distill(factorized(), gpt2(), STAGE, ids(), running={"device": "cpu"}).history
    mine, teacher = factorized(), gpt2()
    seen: set[torch.dtype] = set()
    hook = mine.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    running = {"device": "cpu", "precision": "bf16", "teacher_dtype": "bfloat16"}
    rough = distill(mine, teacher, STAGE, ids(), running=running).history
    hook.remove()
    assert torch.bfloat16 in seen
    assert {p.dtype for model in (mine, teacher) for p in model.parameters()} == {torch.float32}
    assert rough[0]["loss"] != exact[0]["loss"]
    for one, other in zip(rough, exact, strict=True):
        for name, value in other["terms"].items():
            assert one["terms"][name] == pytest.approx(value, rel=0.05, abs=0.02), name
    again = distill(factorized(), gpt2(), STAGE, ids(), running={"device": "cpu"}).history
    assert [e["loss"] for e in again] == [e["loss"] for e in exact], "a precision does not outlive its run"


def test_fp16_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match=r"precision: fp16, but this run is on the CPU.*Set precision: bf16"):
        distill(gpt2(1), gpt2(), STAGE, ids(), running={"device": "cpu", "precision": "fp16"})
    own = Accelerator(cpu=True)
    monkeypatch.setitem(own.state._shared_state, "_mixed_precision", "fp16")
    with pytest.raises(StageError, match="precision: fp16"):
        check_accelerator(own, Running())


def test_accumulation_of_the_accelerators_own_is_refused() -> None:
    own = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with pytest.raises(StageError, match=r"gradient_accumulation_steps=4, .* set accumulation in the stage"):
        distill(gpt2(1), gpt2(), STAGE, ids(), accelerator=own)


def test_held_out_rows_without_labels_are_told_before_any_step() -> None:
    calls: list[Any] = []
    held = {"input_ids": ids(4)}
    with pytest.raises(StageError, match=r"held_out: these rows have no labels"):
        distill(gpt2(1), gpt2(), STAGE, ids(), held_out=held, call=lambda *given: calls.append(given))
    assert not calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_gpu_and_its_resume(precision: str, tmp_path: Path) -> None:
    exact = distill(factorized(), gpt2(), STAGE, ids()).history
    running = {"precision": precision, "checkpoint_every": 2}
    rough = distill(factorized(), gpt2(), STAGE, ids(), folder=tmp_path, running=running).history
    assert [e["loss"] for e in rough] == pytest.approx([e["loss"] for e in exact], rel=0.05)
    state = json.loads((tmp_path / "step-00000002" / "state.json").read_text())
    assert bool(state["scaler"]) == (precision == "fp16")
    shutil.rmtree(tmp_path / "step-00000004")
    again = distill(factorized(), gpt2(), STAGE, ids(), folder=tmp_path, running=running)
    assert again.resumed_at == 2
    assert [e["loss"] for e in again.history] == pytest.approx([e["loss"] for e in rough], rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("option", ["device", "teacher_device"])
def test_no_cuda_is_told(option: str) -> None:
    with pytest.raises(StageError, match=f"{option}: cuda, but this torch .* sees no CUDA device: set {option}: cpu"):
        distill(gpt2(1), gpt2(), STAGE, ids(), running={option: "cuda"})


def test_faults_of_the_options_come_together() -> None:
    with pytest.raises(StageError) as caught:
        distill(gpt2(1), gpt2(), STAGE, ids(), running={"precison": "bf16", "checkpoint_every": 0})
    assert "running.precison" in str(caught.value)
    assert "did you mean 'precision'?" in str(caught.value)
    assert "running.checkpoint_every: Input should be greater than or equal to 1 (got 0)" in str(caught.value)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar that TensorBoard's event files below a folder hold, by tag and step."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        data, place = file.read_bytes(), 0
        while place < len(data):  # each record: its length, a checksum, itself, a checksum
            (size,) = struct.unpack("<Q", data[place : place + 8])
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_is_given_every_loss_term(tmp_path: Path) -> None:
    running = {"device": "cpu", "trackers": ["tensorboard"]}
    result = distill(gpt2(2, seed=1), gpt2(2), STAGE, ids(), folder=tmp_path, held_out=ids(4), running=running)
    written = scalars(tmp_path / "tdkit-distill")
    for name in LOSSES:
        curve = written[f"loss/{name}"]
        assert curve == pytest.approx({e["total"]: e["terms"][name] for e in result.history if "terms" in e}, rel=1e-6)
    assert list(written["loss"]) == list(written["lr"]) == [1, 2, 3, 4]
    assert written["held_out/loss"] == {4: pytest.approx(result.held_out, rel=1e-6)}


def test_trackers_that_are_not_there(tmp_path: Path) -> None:
    for trackers, message in (
        (["tensorbord"], "no tracker 'tensorbord'; did you mean 'tensorboard'"),
        (["tensorboard"], "'tensorboard' writes into the run's folder, and there is none: pass folder="),
    ):
        with pytest.raises(StageError, match=message):
            distill(gpt2(1), gpt2(), STAGE, ids(), running={"trackers": trackers})


def test_a_tracker_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate itself leaves it out without a word."""
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(StageError, match="the package of 'comet_ml' is not installed: pip install comet-ml"):
        distill(gpt2(1), gpt2(), STAGE, ids(), running={"trackers": ["comet_ml"]})


class Kept(GeneralTracker):  # type: ignore[misc]
    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, float]]] = []

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, float], step: int | None, **_: Any) -> None:
        assert step is not None
        self.seen.append((step, values))


def test_a_tracker_of_the_callers_own() -> None:
    tracker = Kept()
    accelerator = Accelerator(log_with=tracker, cpu=True)
    running = {"trackers": ["kept"]}
    distill(gpt2(1), gpt2(), STAGE, ids(), accelerator=accelerator, running=running, held_out=ids(4))
    assert [step for step, _ in tracker.seen] == [1, 2, 3, 4, 4]
    assert {"loss", "lr", *(f"loss/{name}" for name in LOSSES)} <= tracker.seen[0][1].keys()
    assert "held_out/loss" in tracker.seen[-1][1]
    assert "stages" in tracker.configuration
