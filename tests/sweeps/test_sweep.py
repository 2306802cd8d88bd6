"""Sweeps in Python: shared work, resume, failures, trackers."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import CheckpointError, OptionError, PolicyError, WriteError
from tdkit.models.sites import num_params
from tdkit.sweeps import run as sweeping

GRID = {"with": ["low_rank", "kronecker"], "budget": [0.9, 0.8]}


def loss_of(ids: Tensor) -> Any:
    def measure(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(model(ids, labels=ids).loss)}

    return measure


def test_the_points_are_those_of_compress(gpt2: Any, ids: Tensor) -> None:
    before = copy.deepcopy(gpt2.state_dict())
    rows = tdkit.sweep(gpt2, GRID, match="*.mlp.*", calibration=[ids], measure=loss_of(ids))
    assert all(torch.equal(tensor, before[name]) for name, tensor in gpt2.state_dict().items())
    assert [(row["with"], row["budget"]) for row in rows] == [
        ("low_rank", 0.9),
        ("low_rank", 0.8),
        ("kronecker", 0.9),
        ("kronecker", 0.8),
    ]
    alone = copy.deepcopy(gpt2)
    tdkit.compress(alone, Policy([Rule("*.mlp.*", LowRank())], budget=0.8), calibration=[ids])
    assert rows[1]["params"] == num_params(alone)
    assert rows[1]["loss"] == pytest.approx(loss_of(ids)(alone)["loss"], rel=1e-6)
    assert rows[1]["ratio"] == num_params(alone) / num_params(gpt2)
    assert rows[1]["dense_loss"] == pytest.approx(loss_of(ids)(gpt2)["loss"], rel=1e-6)
    assert all(isinstance(value, int | float | str) for row in rows for value in row.values())


def test_curves_are_computed_once_for_all_budgets(
    gpt2: Any, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    plain = LowRank.curve

    def curve(self: LowRank, *arguments: Any) -> Any:
        made.append(repr(self))
        return plain(self, *arguments)

    monkeypatch.setattr(LowRank, "curve", curve)
    for folder in (None, tmp_path / "sweep"):
        made.clear()
        tdkit.sweep(gpt2, {"budget": [0.9, 0.8, 0.7]}, match="*.c_fc", calibration=[ids], folder=folder)
        assert len(made) == 4, "one for each layer"


def test_a_killed_sweep_goes_on_and_does_no_point_again(
    gpt2: Any, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep(measure: Any) -> list[dict[str, Any]]:
        return tdkit.sweep(gpt2, GRID, match="*.mlp.*", calibration=[ids], measure=measure, folder=tmp_path / "sweep")

    calls: list[int] = []

    def dies(model: nn.Module) -> dict[str, float]:
        calls.append(num_params(model))
        if len(calls) == 4:  # the dense model, two points, and the third is killed after its fit
            raise KeyboardInterrupt
        return loss_of(ids)(model)

    with pytest.raises(KeyboardInterrupt):
        sweep(dies)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "sweep" / "points").glob("*.json")}
    assert len(kept) == 2

    def calibrates(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the calibration was kept")

    monkeypatch.setattr(sweeping, "measured", calibrates)
    calls.clear()

    def counts(model: nn.Module) -> dict[str, float]:
        calls.append(num_params(model))
        return loss_of(ids)(model)

    rows = sweep(counts)
    assert len(calls) == 2
    assert all((tmp_path / "sweep" / "points" / name).read_bytes() == text for name, text in kept.items())
    monkeypatch.undo()
    assert not (tmp_path / "sweep" / "work").exists()
    whole = tdkit.sweep(gpt2, GRID, match="*.mlp.*", calibration=[ids], measure=loss_of(ids))
    for row, other in zip(rows, whole, strict=True):
        assert row["params"] == other["params"]
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    calls.clear()
    assert sweep(counts) == rows
    assert not calls, "nothing is left to do"


def test_a_folder_of_another_sweep_is_refused(gpt2: Any, ids: Tensor, tmp_path: Path) -> None:
    def sweep(**options: Any) -> list[dict[str, Any]]:
        return tdkit.sweep(gpt2, {"budget": [0.9]}, match="*.c_fc", folder=tmp_path / "sweep", **options)

    sweep(calibration=[ids])
    with pytest.raises(CheckpointError, match="holds a sweep whose calibration differed"):
        sweep(calibration=[ids[:1]])
    with torch.no_grad():
        gpt2.transformer.wte.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="holds a sweep whose model differed"):
        sweep(calibration=[ids])
    sweep(calibration=[ids], overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="holds other files than a sweep"):
        tdkit.sweep(gpt2, {"budget": [0.9]}, folder=tmp_path / "other", overwrite=True)


def test_a_point_that_cannot_be_carried_out_says_why(gpt2: Any) -> None:
    rows = tdkit.sweep(gpt2, {"budget": [0.01, 0.9]}, match="*.c_fc")
    assert "cannot be met" in rows[0]["failure"]
    assert rows[0]["params"] is None
    assert rows[1]["failure"] == ""


def test_a_policy_that_does_not_fit_is_an_error_before_any_work(gpt2: Any) -> None:
    def measure(_: nn.Module) -> dict[str, float]:
        raise AssertionError("nothing may run")

    with pytest.raises(PolicyError, match="bad: rule 'nowhere' matched no layer"):
        tdkit.sweep(
            gpt2,
            {"good": Policy([Rule("*.c_fc", LowRank())], budget=0.9), "bad": Policy([Rule("nowhere", LowRank())], 0.9)},
            measure=measure,
        )


def test_figures_must_be_numbers(gpt2: Any) -> None:
    with pytest.raises(OptionError, match="measure returned 3"):
        tdkit.sweep(gpt2, {"budget": [0.9]}, match="*.c_fc", measure=lambda _: 3)  # type: ignore[arg-type, return-value]


def test_trackers_get_every_point(gpt2: Any, ids: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    options: dict[str, Any] = {"match": "*.c_fc", "measure": loss_of(ids)}
    tdkit.sweep(gpt2, {"budget": [0.9, 0.8]}, folder=tmp_path / "s", log_with=["tensorboard"], **options)
    assert list((tmp_path / "s").rglob("events.out.tfevents*"))
    with pytest.raises(OptionError, match="there is no tracker 'tensorbord'; did you mean 'tensorboard'"):
        tdkit.sweep(gpt2, {"budget": [0.9]}, log_with=["tensorbord"], **options)
    with pytest.raises(OptionError, match="the package of 'wandb' is not installed: pip install wandb"):
        tdkit.sweep(gpt2, {"budget": [0.9]}, log_with=["wandb"], **options)
    with pytest.raises(OptionError, match="writes into the run's folder, and there is none"):
        tdkit.sweep(gpt2, {"budget": [0.9]}, log_with=["tensorboard"], **options)


def test_any_model_and_metric(tied: nn.Module) -> None:
    ids = torch.arange(12).view(2, 6)
    rows = tdkit.sweep(
        tied,
        {"budget": [0.9, 0.8]},
        match=["up", "down"],
        measure=lambda model: {"mean": float(model(ids).mean())},
        higher_is_better=["mean"],
    )
    assert [row["ratio"] <= budget for row, budget in zip(rows, (0.9, 0.8), strict=True)] == [True, True]
    json.dumps(rows)


@pytest.mark.parametrize("text", ["", "[1]", '{"params": "many"}', "\udcff"])
def test_damaged_figures_of_the_dense_model_are_told(text: str, gpt2: Any, ids: Tensor, tmp_path: Path) -> None:
    """They are those of an unfinished sweep."""
    grid: dict[str, list[Any]] = {"with": ["low_rank"], "budget": [0.9]}

    def killed(_: nn.Module) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tdkit.sweep(gpt2, grid, measure=killed, folder=tmp_path / "s")
    (tmp_path / "s" / "work" / "dense.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"dense\.json is damaged .*measured again"):
        tdkit.sweep(gpt2, grid, folder=tmp_path / "s")


def test_overwriting_leaves_files_of_others(gpt2: Any, tmp_path: Path) -> None:
    grid: dict[str, list[Any]] = {"with": ["low_rank"], "budget": [0.9]}
    tdkit.sweep(gpt2, grid, folder=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "points" / "old.json").write_text("")
    tdkit.sweep(gpt2, grid, folder=tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [file.name for file in (tmp_path / "points").iterdir()] == ["low_rank 0.9.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"job": "x"}', '{"job": null}'])
def test_a_damaged_description_is_told(text: str, gpt2: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"sweep\.json is damaged .*remove the folder"):
        tdkit.sweep(gpt2, {"with": ["low_rank"], "budget": [0.9]}, folder=tmp_path)


def test_a_sweep_that_was_killed_as_it_began_goes_on(gpt2: Any, tmp_path: Path) -> None:
    for name in ("points", "work/curves"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "work" / "begin.lock").touch()
    (row,) = tdkit.sweep(gpt2, {"with": ["low_rank"], "budget": [0.9]}, folder=tmp_path)
    assert not row["failure"]


def test_a_folder_that_cannot_be_made_is_told(gpt2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(WriteError, match=r"sweep cannot be written .*No space left"):
        tdkit.sweep(gpt2, {"budget": [0.9]}, folder=tmp_path / "sweep")
