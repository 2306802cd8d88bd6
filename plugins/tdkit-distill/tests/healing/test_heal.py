"""Healing brings a compressed model back towards its dense one, keeps the best weights and says what it did."""

from __future__ import annotations

import copy
import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import tdkit
import torch
from distill_models import ids, same_weights, text
from tdkit.errors import OptionError
from tdkit.models.sites import factorized_layers

from tdkit_distill import HealingWarning, InterruptedHealing, Windows, heal
from tdkit_distill.errors import DataError, ResumeError
from tdkit_distill.healing.heal import distill as engine

OPTIONS: dict[str, Any] = {"tokens": "4k", "learning_rate": 3e-3, "batch_size": 4, "precision": "no", "device": "cpu"}
OTHERS = {"again": Windows(text(8))}


def healed(student: Any, teacher: Any, **options: Any) -> Any:
    return heal(student, teacher, text(256), **{**OPTIONS, "others": OTHERS, **options})


@pytest.mark.parametrize("method", ["all", "factors", "adapters"])
def test_held_out_loss_falls_towards_the_teachers(method: Any, student: Any, taught: Any) -> None:
    names = [name for name, _ in student.named_parameters()]
    classes = [type(module) for module in student.modules()]
    modes = [module.training for module in student.modules()]
    needs = [parameter.requires_grad for parameter in student.parameters()]
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    done = healed(student, taught, method=method)
    assert done.finished
    assert done.teacher["held out"] < 1.1
    assert (
        done.after.perplexity["held out"] < (0.5 if method == "factors" else 0.2) * done.before.perplexity["held out"]
    )
    assert done.after.perplexity["held out"] == min(each.perplexity["held out"] for each in done.measurements)
    assert done.after.tokens == done.after.steps * 4 * 12
    assert [name for name, _ in student.named_parameters()] == names, "adapters are merged"
    assert [type(module) for module in student.modules()] == classes
    assert [module.training for module in student.modules()] == modes
    assert [parameter.requires_grad for parameter in student.parameters()] == needs
    moved = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    assert "transformer.wte.weight" not in moved
    factors = {name for name in names if ".mlp." in name and not name.endswith("bias")}
    assert factors <= moved
    assert (moved == factors) is (method == "factors")
    assert ("transformer.h.0.attn.c_attn.weight" in moved) is (method != "factors")
    assert not any(word in record for record in done.warnings for word in ("worse",))


def test_what_was_said_is_what_was_done(student: Any, taught: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    done = healed(student, taught, say=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("healing: 4,000 tokens in 84 steps, ")
    assert done.estimate.trained == sum(
        p.numel()
        for n, p in student.named_parameters()
        if n not in ("transformer.wte.weight", "transformer.wpe.weight")
    )
    assert done.measurements[-1].steps == 84
    done.save(tmp_path / "healing.json")
    read = json.loads((tmp_path / "healing.json").read_text())
    assert read["measurements"][read["kept"]]["perplexity"]["again"] == done.after.perplexity["again"]
    assert read["teacher"].keys() == {"held out", "again"}
    rows = done.markdown().splitlines()
    assert rows[0] == "|  | tokens | time | held out | again |"
    assert rows[2].startswith("| teacher |")
    assert sum("(kept)" in row for row in rows) == 1


def test_the_same_seed_gives_the_same_weights(student: Any, taught: Any) -> None:
    again, other = copy.deepcopy(student), copy.deepcopy(student)
    for model, seed in ((student, 0), (again, 0), (other, 1)):
        healed(model, taught, seed=seed, tokens=600)
    assert same_weights(student, again)
    assert not same_weights(student, other)


def test_weights_that_training_only_spoils_are_left_as_they_are(taught: Any) -> None:
    before = copy.deepcopy(taught)
    done = healed(taught_copy := copy.deepcopy(taught), taught, learning_rate=1.0, patience=2)
    assert done.kept == 0
    assert len(done.measurements) == 3
    assert same_weights(taught_copy, before)


def test_a_warning_tells_that_another_text_got_worse(student: Any, taught: Any) -> None:
    other = {"random": Windows(ids(8, 12))}
    with pytest.warns(HealingWarning, match=r"healing made 'random' worse: perplexity .* mix other texts into it"):
        done = healed(student, taught, losses={"cross_entropy": 1}, others=other)
    assert len(done.warnings) == 1


def test_a_missing_measurement_is_told(student: Any, taught: Any) -> None:
    with pytest.warns(HealingWarning, match="no text of another kind is measured: pass others="):
        healed(student, taught, others=None, tokens=200)


@pytest.mark.parametrize("method", ["all", "adapters"])
def test_interrupted_healing_has_the_best_weights_and_goes_on_bit_for_bit(
    method: Any, student: Any, taught: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, again = copy.deepcopy(student), copy.deepcopy(student)
    whole = healed(undisturbed, taught, method=method)
    calls = 0

    def call(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += model.training
        if calls == 30 and model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return model(batch["input_ids"])

    def interrupting(*arguments: Any, **options: Any) -> Any:
        return engine(*arguments, call=call, **options)

    monkeypatch.setattr("tdkit_distill.healing.heal.distill", interrupting)
    with pytest.raises(InterruptedHealing, match="run again to go on; the model has the best weights so far") as raised:
        healed(student, taught, method=method, folder=tmp_path)
    so_far = raised.value.healing
    assert not so_far.finished
    assert so_far.measurements == tuple(
        type(each)(each.steps, each.tokens, mine.seconds, each.perplexity)
        for each, mine in zip(whole.measurements, so_far.measurements, strict=False)
    )
    assert not any("parametrizations" in name for name, _ in student.named_parameters())
    monkeypatch.undo()
    lines: list[str] = []
    done = healed(again, taught, method=method, folder=tmp_path, say=lines.append)
    assert "(30 done)" in lines[0]
    assert done.finished
    assert same_weights(again, undisturbed)
    with pytest.raises(ResumeError, match=r"has precision no: give precision='no'"):
        healed(again, taught, method=method, folder=tmp_path, precision="bf16")


def test_without_a_teacher_the_labels_teach(student: Any) -> None:
    done = healed(student, None)
    assert done.teacher is None
    assert done.settings["losses"] == {"cross_entropy": 1.0}
    assert done.after.perplexity["held out"] < 0.2 * done.before.perplexity["held out"]


def test_a_teacher_that_is_run_beside_it_teaches_the_same(student: Any, taught: Any) -> None:
    kept = copy.deepcopy(student)
    live = healed(student, taught, top_k=None, tokens=1000)
    cached = healed(kept, taught, top_k=48, tokens=1000)  # all of the vocabulary
    assert live.after.perplexity == pytest.approx(cached.after.perplexity, rel=1e-5)


def test_classifiers_of_images_are_healed(taught: Any) -> None:
    from distill_models import Convolutional, images
    from torch.utils.data import TensorDataset

    teacher = Convolutional()
    data = TensorDataset(*images(256, 1))
    engine(
        teacher, None, {"losses": {"cross_entropy": 1}, "steps": 60, "batch_size": 32, "optimizer": {"lr": 1e-2}}, data
    )
    smaller = tdkit.compress(
        copy.deepcopy(teacher), tdkit.Policy([tdkit.Rule("body.*", tdkit.Tucker())], budget=0.4), progress=False
    )
    assert len(list(factorized_layers(smaller))) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HealingWarning)
        done = heal(smaller, teacher, data, **{**OPTIONS, "tokens": 2000, "batch_size": 32, "learning_rate": 1e-2})
    assert done.after.perplexity["held out"] < done.before.perplexity["held out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "some"}, "method='some' is none of all, factors, adapters"),
        ({"tokens": "much"}, "tokens: 'much' is no count"),
        ({"tokens": 0}, "tokens=0: give how many to train on"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: give a positive number"),
        ({"measurements": 0}, "measurements=0: give at least 1"),
        ({"precision": "fp8"}, "precision='fp8' is none of"),
        ({"device": "mars"}, "device='mars' is no device"),
    ],
)
def test_options_that_cannot_be_met(options: dict[str, Any], message: str, student: Any, taught: Any) -> None:
    with pytest.raises(OptionError, match=message):
        healed(student, taught, **options)


def test_data_that_cannot_be_used(student: Any, taught: Any) -> None:
    with pytest.raises(DataError, match="1 rows leave none to measure on"):
        heal(student, taught, text(1), **OPTIONS)
    with pytest.raises(OptionError, match=r"weights in torch.bfloat16, .* heal it in float32, model.float\(\)"):
        healed(copy.deepcopy(student).bfloat16(), taught)


def test_a_dry_run_changes_nothing(student: Any, taught: Any, tmp_path: Path) -> None:
    before = copy.deepcopy(student)
    done = healed(student, taught, dry_run=True)
    assert done.estimate.steps == 84
    assert not done.measurements
    assert same_weights(student, before)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_healing_is_at_the_top_of_tdkit() -> None:
    assert tdkit.heal is heal


@pytest.mark.parametrize("form", ["", "[]", '{"precision": "half"}', "{}"])
def test_a_damaged_precision_is_told(form: str, student: Any, taught: Any, tmp_path: Path) -> None:
    (tmp_path / "precision.json").write_text(form)
    with pytest.raises(ResumeError, match=r"precision\.json is damaged.*chosen anew"):
        healed(student, taught, folder=tmp_path)
