"""``tdkit heal``: from a saved folder to a healed one that loads as before, interrupted and gone on with."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tdkit
import torch
from tdkit.cli import commands
from tdkit.cli.app import main
from tdkit.records import Record

from tdkit_distill.command import heal
from tdkit_distill.healing.heal import distill as engine

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The command in this process; windows are packed in a folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(commands.commands._loaded, "heal", heal)
    monkeypatch.setattr(commands.commands, "origins", lambda: {"heal": ["tdkit-distill"]})

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tdkit", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def arguments(folders: dict[str, Path], out: Path) -> list[Any]:
    return [
        *("heal", folders["smaller"], "--text", folders["text"], "--other", folders["other"], "--out", out),
        *("--tokens", "4k", "--context", 16, "--learning-rate", 3e-3, "--batch", 4, "--device", "cpu"),
    ]


def test_a_healed_folder_is_one_as_before(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "healed"
    code, printed, told = run(*arguments(folders, out))
    assert code == 0, told
    assert "healing: 4,000 tokens in 63 steps" in told
    assert f"saved to {out}, with healing.json" in told
    assert f"warning: healing made '{folders['other']}' worse" in told
    assert "(kept)" in printed
    assert not (tmp_path / "healed.run").exists()
    report = json.loads((out / "healing.json").read_text())
    first, *others = report["teacher"]
    assert others == [str(folders["other"])]
    kept = report["measurements"][report["kept"]]["perplexity"]
    assert kept[first] < 0.7 * report["measurements"][0]["perplexity"][first]
    before, after = tdkit.load(folders["smaller"]), tdkit.load(out)
    assert [str(type(m)) for m in before.modules()] == [str(type(m)) for m in after.modules()]
    assert tdkit.applied_plan(after).params_after == tdkit.applied_plan(before).params_after
    from transformers import AutoModelForCausalLM

    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, after(ids).logits)
    assert f"compressed_from: {folders['dense']}" in (out / "README.md").read_text()
    code, _, told = run(*arguments(folders, out))
    assert code == 2
    assert "holds a saved model: give another folder, or --overwrite it" in told


def test_the_report_of_a_healed_folder_has_its_curve_and_both_commands(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    compressed, out = tmp_path / "compressed", tmp_path / "healed"
    rank = ("--with", "{low_rank: {rank: 2}}", "--match", "*.mlp.*")
    code, _, told = run("compress", folders["dense"], *rank, "--out", compressed, "--no-report")
    assert code == 0, told
    call = arguments({**folders, "smaller": compressed}, out)
    code, _, told = run(*call, "--teacher", folders["dense"])
    assert code == 0, told
    record = Record.read(out / "record.json")
    compress, heal_ = record.command.split(" && ")
    assert (compress.split()[:2], heal_.split()[:2]) == (["tdkit", "compress"], ["tdkit", "heal"])
    assert record.options["then"] == ["healed on 4,032 tokens"]
    assert [(data.role, data.name) for data in record.data] == [("train", str(folders["text"]))]
    healing = json.loads((out / "healing.json").read_text())
    kept = healing["measurements"][healing["kept"]]["perplexity"]
    assert {
        name.removesuffix(" perplexity"): value for name, value in record.compressed.items()
    }.items() >= kept.items()
    assert record.spectra, "what was seen of the dense model is kept"
    if find_spec("matplotlib"):
        page = json.loads((out / "report" / "report.json").read_text())
        assert "then healed on 4,032 tokens" in page["models"][0]["sentence"]
        curve = next(figure for name, figure in page["figures"].items() if "training" in name)
        assert {row[0] for row in curve["rows"]} >= {"loss", "held-out loss"}


def test_what_is_interrupted_is_saved_and_goes_on(
    run: Run, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "healed"
    assert run(*arguments(folders, undisturbed), "--precision", "no")[0] == 0
    calls = 0

    def call(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += model.training
        if calls == 20 and model.training:
            os.kill(os.getpid(), signal.SIGINT)
        return model(batch["input_ids"])

    with monkeypatch.context() as patch:
        patch.setattr("tdkit_distill.healing.heal.distill", lambda *a, **o: engine(*a, call=call, **o))
        code, _, told = run(*arguments(folders, out), "--precision", "no")
    assert code == 130, told
    assert f"{out} holds them; the same call goes on from there" in told
    half = json.loads((out / "healing.json").read_text())
    assert half["finished"] is False
    assert tdkit.load(out) is not None
    code, _, told = run(*arguments(folders, out), "--precision", "no")
    assert code == 0, told
    assert "(20 done)" in told
    mine, theirs = (tdkit.load(folder).state_dict() for folder in (out, undisturbed))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert json.loads((out / "healing.json").read_text())["finished"] is True


def test_a_dry_run_writes_nothing(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    code, printed, told = run(*arguments(folders, tmp_path / "healed"), "--dry-run")
    assert code == 0, told
    assert "tokens/s" in told
    assert "nothing was trained" in printed
    assert not (tmp_path / "healed").exists()
    assert not (tmp_path / "healed.run").exists()


def test_an_unknown_teacher_is_told_first(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    code, _, told = run("heal", folders["dense"], "--text", folders["text"], "--out", tmp_path / "x")
    assert code == 2
    assert "does not say which dense model it is from: give --teacher NAME, or --teacher none" in told


def test_help_has_an_example(run: Run) -> None:
    code, printed, _ = run("heal", "--help")
    assert code == 0
    assert "tdkit heal smaller --text sotu:calibration --tokens 200k --out healed" in " ".join(printed.split())
