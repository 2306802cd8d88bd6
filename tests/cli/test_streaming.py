"""``tdkit compress --stream`` and ``tdkit calibrate``."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tdkit.calibration.calibration import Calibration
from tests.cli.command import Result, run
from tests.compression.streaming import contents

Tdkit = Callable[..., Result]
MLP = ("--match", "*.mlp.*", "--budget", "0.9")


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return partial(run, capsys, monkeypatch)


@pytest.fixture
def text(text_file: Path) -> tuple[str, ...]:
    return ("--text", str(text_file), "--tokens", "256", "--context", "32")


def test_a_streamed_folder_is_that_of_the_command_without(
    tdkit: Tdkit, gpt2_folder: Path, text: tuple[str, ...], tmp_path: Path
) -> None:
    measured = tdkit("calibrate", gpt2_folder, "--out", tmp_path / "moments", *text, "--stream", "--json")
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["batches"] == 8
    given = (*MLP, "--calibration", tmp_path / "moments")
    plain = tdkit("compress", gpt2_folder, "--out", tmp_path / "plain", *given, "--no-report", "--json")
    assert plain.code == 0, plain.err
    streamed = tdkit(
        "compress", gpt2_folder, "--out", tmp_path / "streamed", *given, "--stream", "--no-report", "--json"
    )
    assert streamed.code == 0, streamed.err
    for name in ("streamed", "plain"):  # the times in them differ
        (tmp_path / name / "record.json").unlink()
    assert contents(tmp_path / "streamed") == contents(tmp_path / "plain")
    ours, theirs = json.loads(streamed.out), json.loads(plain.out)
    assert ours["steps"] == theirs["steps"]
    assert ours["params_after"] == theirs["params_after"]
    planned = tdkit("plan", gpt2_folder, *given, "--json")
    dry = tdkit("compress", gpt2_folder, "--out", tmp_path / "dry", *given, "--stream", "--dry-run", "--json")
    assert json.loads(dry.out)["steps"] == json.loads(planned.out)["steps"]
    assert not (tmp_path / "dry").exists()


def test_moments_are_the_same_with_and_without_stream(
    tdkit: Tdkit, gpt2_folder: Path, text: tuple[str, ...], tmp_path: Path
) -> None:
    for name, option in (("whole", ()), ("streamed", ("--stream",))):
        done = tdkit("calibrate", gpt2_folder, "--out", tmp_path / name, *text, *option)
        assert done.code == 0, done.err
    whole, streamed = Calibration.load(tmp_path / "whole"), Calibration.load(tmp_path / "streamed")
    assert sorted(whole.names) == sorted(streamed.names)
    again = tdkit("calibrate", gpt2_folder, "--out", tmp_path / "whole", *text)
    assert again.code == 2
    assert "--overwrite for earlier moments" in again.err


def test_what_goes_without_stream_only_is_told(
    tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    given = ("compress", gpt2_folder, "--out", tmp_path / "out", *MLP)
    texts = ("--calibration", text_file)
    for options, message in (
        (("--stream", *texts), "--stream takes saved moments: write them with tdkit calibrate MODEL --stream"),
        (("--stream", *texts, "--sequential"), "--sequential runs the whole model and goes without --stream only"),
        (("--stream", *texts, "--passes", "2"), "--passes 2 runs the whole model"),
        (("--workers", "2"), "--workers 2 needs --stream"),
    ):
        done = tdkit(*given, *options)
        assert done.code == 2
        assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_moments_are_given_alone(tdkit: Tdkit, gpt2_folder: Path, text: tuple[str, ...], tmp_path: Path) -> None:
    assert tdkit("calibrate", gpt2_folder, "--out", tmp_path / "moments", *text, "--stream").code == 0
    both = ("--calibration", tmp_path / "moments", "--calibration", text[1])
    done = tdkit("plan", gpt2_folder, *MLP, *both)
    assert done.code == 2
    assert "holds saved moments: give it alone" in done.err
