"""A torch model of the user's own goes through every command by its import path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model

from tdkit.records import Record
from tdkit.sources.own import build_model
from tests.cli.command import Result, run
from tests.side_packages import use_torchao

Tdkit = Callable[..., Result]
ROOT = Path(__file__).parents[2]

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 5)
    def forward(self, x):
        return self.head(self.down(nn.functional.relu(self.up(x))))

def batches():
    import torch
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 24, generator=generator), torch.arange(8) % 5) for _ in range(3)]
"""


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return partial(run, capsys, monkeypatch)


@pytest.fixture
def here(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with weights and data; its module is on the path."""
    monkeypatch.chdir(tmp_path)
    (site / "cli_nets.py").write_text(CODE, encoding="utf-8")
    torch.manual_seed(0)
    save_model(build_model("cli_nets:Net").model, "net.safetensors")
    save_file({"inputs": torch.randn(40, 24), "labels": torch.arange(40) % 5}, "data.safetensors")
    return tmp_path


MODEL = ("--model", "cli_nets:Net", "--weights", "net.safetensors")


@pytest.mark.parametrize("data", ["data.safetensors", "cli_nets:batches"])
def test_plan_compress_eval(tdkit: Tdkit, here: Path, data: str) -> None:
    policy = ("--budget", "0.7", "--data", data)
    planned = json.loads(tdkit("plan", *MODEL, *policy, "--json").out)
    assert planned["params_after"] <= 0.7 * planned["params_before"]
    assert any(step["loss"] is not None for step in planned["steps"]), "the plan is calibrated"
    made = tdkit("compress", *MODEL, *policy, "--out", "smaller")
    assert made.code == 0, made.err
    assert "load it with --model cli_nets:Net --weights smaller" in made.err
    smaller = ("--model", "cli_nets:Net", "--weights", "smaller")
    measured = tdkit("eval", *smaller, "--data", data, "--against", "net.safetensors", "--out", "report.json")
    assert measured.code == 0, measured.err
    for part in ("net.safetensors", "smaller", "ratio", "accuracy", "agreement"):
        assert part in measured.out
    figures = json.loads(Path("report.json").read_text())["results"][0]["figures"]
    assert figures["ratio"]["value"] <= 0.7
    assert 0 < figures["relative error"]["value"] < 1
    same = tdkit("eval", *MODEL, "--data", data, "--against", "net.safetensors", "--json")
    figures = json.loads(same.out)["results"][0]["figures"]
    assert figures["agreement"]["value"] == figures["ratio"]["value"] == 1
    assert figures["accuracy"] == figures["dense accuracy"]


def test_quality_before_and_after_is_in_the_record(tdkit: Tdkit, here: Path) -> None:
    save_file({"inputs": torch.randn(40, 24)}, "unlabelled.safetensors")
    for data, names in (("data", {"accuracy"}), ("unlabelled", {"agreement", "relative error"})):
        call = ("--budget", "0.5", "--data", "data.safetensors", "--evaluation-data", f"{data}.safetensors")
        done = tdkit("compress", *MODEL, *call, "--out", data)
        assert done.code == 0, done.err
        record = json.loads(Path(data, "record.json").read_text())
        assert set(record["dense"]) == set(record["compressed"]) == {"params", "bytes", *names}
        used = {each["role"]: each for each in record["data"]}
        assert used["evaluation"]["name"] == f"batches of {data}.safetensors"
        assert (used["evaluation"]["sha256"] == used["calibration"]["sha256"]) == (data == "data")
    assert (record["dense"]["agreement"], record["dense"]["relative error"]) == (1, 0)
    assert 0 < record["compressed"]["relative error"] < 1
    measured = tdkit("eval", *MODEL[:2], "--weights", "data", "--data", "data.safetensors", "--json")
    accuracy = json.loads(measured.out)["results"][0]["figures"]["accuracy"]["value"]
    assert json.loads(Path("data", "record.json").read_text())["compressed"]["accuracy"] == accuracy


def test_a_sweep_measures_by_labels(tdkit: Tdkit, here: Path) -> None:
    save_file({"inputs": torch.randn(24, 24), "labels": torch.arange(24) % 5}, "test.safetensors")
    axes = ("budget=0.8,0.5", "with=low_rank,kronecker")
    call = ("sweep", *axes, *MODEL, "--data", "data.safetensors", "--evaluation-data", "test.safetensors")
    done = tdkit(*call, "--within", "2", "--out", "sweep")
    assert done.code == 0, done.err
    assert "fitted to" not in done.err
    assert "the largest reduction within 200% of the dense model's accuracy: " in done.out
    records = [json.loads(file.read_text()) for file in sorted(Path("sweep", "points").glob("*.json"))]
    assert len(records) == 4
    dense = json.loads(tdkit("eval", *MODEL, "--data", "test.safetensors", "--json").out)
    for record in records:
        assert record["model"] == "cli_nets:Net"
        assert record["dense"]["accuracy"] == dense["results"][0]["figures"]["accuracy"]["value"]
        assert "accuracy" in record["higher_is_better"]
    save_file({"inputs": torch.randn(24, 24), "labels": torch.arange(24) % 5}, "test.safetensors")
    assert "holds a sweep whose conditions differed" in tdkit(*call, "--out", "sweep").err


def test_a_sweep_without_labels_measures_agreement_in_several_processes(tdkit: Tdkit, here: Path, site: Path) -> None:
    code = (site / "cli_nets.py").read_text()
    Path("nets_here.py").write_text(
        code.replace("(torch.randn(8, 24, generator=generator), torch.arange(8) % 5)", "torch.randn(8, 24)")
    )
    call = ("sweep", "budget=0.9,0.5", "--model", "nets_here:Net", "--data", "nets_here:batches", "--inputs-only")
    done = tdkit(*call, "--jobs", "2", "--out", "sweep", "--json")
    assert done.code == 0, done.err
    assert "quality is measured on nets_here:batches, which the points are fitted to: --evaluation-data" in done.err
    large, small = json.loads(done.out)["points"]
    assert (large["dense_agreement"], large["dense_relative error"]) == (1, 0)
    assert 0 < large["relative error"] < small["relative error"] < 1
    assert "dense model's agreement" in json.loads(done.out)["choice"]
    numbers = json.loads(Path("sweep", "report", "report.json").read_text())
    assert "relative error 0 → 0." in numbers["models"][0]["sentence"]
    assert "nan" not in numbers["models"][0]["sentence"]


def test_quantizing_goes_on_with_the_record(tdkit: Tdkit, here: Path) -> None:
    use_torchao()
    pytest.importorskip("torchao")
    data = ("--evaluation-data", "data.safetensors")
    assert tdkit("compress", *MODEL, "--budget", "0.7", *data, "--out", "small").code == 0
    for weights, place, commands in (("small", "smaller", 2), ("net.safetensors", "rounded", 1)):
        done = tdkit("quantize", *MODEL[:2], "--weights", weights, "--out", place)
        assert done.code == 0, done.err
        record = Record.read(Path(place, "record.json"))
        assert record.command is not None
        assert record.command.count("tdkit quantize") == 1
        assert record.command.count("tdkit ") == commands
        assert record.options["then"] == ["rounded to 8 bits"]
        assert record.compressed["bytes"] < 0.5 * record.dense["bytes"]
        assert set(record.compressed) == {"params", "bytes"}, "what was measured before it is not of this model"
        if find_spec("matplotlib"):
            assert "then rounded to 8 bits" in Path(place, "report", "report.html").read_text()


def test_calibrate_and_bench(tdkit: Tdkit, here: Path) -> None:
    made = tdkit("calibrate", *MODEL, "--data", "data.safetensors", "--batch-size", "8", "--out", "moments", "--json")
    assert json.loads(made.out)["batches"] == 5
    assert json.loads(made.out)["layers"] == 3
    assert tdkit("plan", *MODEL, "--budget", "0.8", "--calibration", "moments").code == 0
    timed = tdkit("bench", *MODEL, "--budget", "0.8", "--tokens", "1", "--seconds", "0.01", "--json")
    assert timed.code == 0, timed.err
    assert {row["what"] for row in json.loads(timed.out)["rows"]} != set()


def test_the_current_folder_is_on_the_path(here: Path, tmp_path: Path) -> None:
    """In a process of its own, as the console script, whose path does not have the current folder."""
    (tmp_path / "nets_here.py").write_text(CODE, encoding="utf-8")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    code = "import sys; sys.path.remove(''); from tdkit.cli.app import main; main()"
    call = [sys.executable, "-c", code, "plan", "--model", "nets_here:Net", "--budget", "0.7", "--json"]
    done = subprocess.run(
        call, env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["params_before"] == 24 * 48 + 48 + 48 * 24 + 24 + 24 * 5 + 5


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (("plan",), 2, "give one model: MODEL by name or folder, or --model MODULE:NAME"),
        (("plan", "smollm2", *MODEL), 2, "give one model"),
        (("plan", "smollm2", "--weights", "net.safetensors"), 2, "--weights net.safetensors goes with --model"),
        (("plan", *MODEL, "--data", "data.safetensors", "--calibration", "moments"), 2, "give one of them"),
        (("plan", "--model", "cli_nets:Nte"), 1, "did you mean 'Net'"),
        (("calibrate", *MODEL, "--out", "moments"), 2, "give what to calibrate on: --text or --data"),
        (("compress", *MODEL, "--stream", "--out", "x"), 2, "give MODEL, not --model"),
        (("sweep", *MODEL, "--out", "x"), 2, "nothing varies: give KEY=VALUE,VALUE"),
        (("sweep", "budget=0.9", "--out", "x"), 2, "give one model"),
        (("sweep", "smollm2", "budget=0.9", *MODEL, "--out", "x"), 2, "give one model"),
        (("compress", *MODEL, "--evaluation-data", "nowhere.npz", "--out", "x"), 1, "no data 'nowhere.npz'"),
        (("export", *MODEL, "--to", "onnx", "--out", "x"), 2, "--to onnx records --model on a batch: give --data"),
        (("export", *MODEL, "--to", "dense", "--out", "x"), 2, "a file, whose name ends in .safetensors"),
        (("export", *MODEL, "--to", "dense", "--data", "d", "--out", "x"), 2, "leave it out with --to dense"),
        (("eval", *MODEL, "--tasks", "x", "--metric", "mse"), 2, "--metric is for batches: give --data"),
        (("eval", *MODEL, "--tasks", "x", "--against", "y"), 2, "--against is for texts and batches"),
        (("eval", *MODEL, "--data", "nowhere.npz"), 1, "no data 'nowhere.npz'"),
        (("eval", *MODEL, "--data", "data.safetensors", "--against", "nowhere"), 1, "no weights nowhere"),
    ],
)
def test_mistakes_are_told(tdkit: Tdkit, here: Path, call: tuple[str, ...], code: int, message: str) -> None:
    done = tdkit(*call)
    assert (done.code, message in done.err) == (code, True), done.err


def test_a_dry_run_says_what_would_be_measured(tdkit: Tdkit, here: Path) -> None:
    done = tdkit("eval", *MODEL, "--data", "data.safetensors", "--against", "net.safetensors", "--dry-run")
    assert done.out == "would measure cli_nets:Net on the batches of data.safetensors and against net.safetensors\n"


def test_a_folder_of_such_a_model_says_how_it_is_loaded(tdkit: Tdkit, here: Path) -> None:
    assert tdkit("compress", *MODEL, "--budget", "0.7", "--out", "smaller").code == 0
    done = tdkit("eval", "smaller", "--data", "data.safetensors")
    assert done.code == 1
    assert "--model MODULE:NAME --weights smaller" in done.err


def test_a_language_model_is_compared_with_its_dense_one(
    tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert tdkit("compress", gpt2_folder, "--budget", "0.7", "--out", tmp_path / "smaller").code == 0
    text = ("--text", text_file, "--context", "32", "--tokens", "512", "--against", gpt2_folder)
    done = tdkit("eval", tmp_path / "smaller", *text, "--json")
    figures = json.loads(done.out)["results"][0]["figures"]
    dense = json.loads(tdkit("eval", gpt2_folder, *text[:-2], "--json").out)["results"][0]["figures"]
    assert figures["dense perplexity"] == dense["perplexity"]
    assert 0 <= figures["agreement"]["value"] < 1
    assert figures["ratio"]["value"] <= 0.7
    assert "agreement" in tdkit("eval", tmp_path / "smaller", *text).out
