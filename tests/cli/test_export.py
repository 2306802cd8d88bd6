"""``tdkit export``: what it writes computes as the compressed model does."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tdkit as package
from tdkit.cli import exporting as export
from tdkit.models.hosts.base import FactorizedModule
from tdkit.sources.models import load_model
from tdkit.sources.own import build_model
from tests.cli.command import Result, run

Tdkit = Callable[..., Result]


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return partial(run, capsys, monkeypatch)


@pytest.fixture(scope="module")
def folder(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = load_model(str(gpt2_folder))
    policy = package.Policy([package.Rule("*", package.LowRank())], budget=0.6)
    package.compress(source.model, policy, progress=False)
    return package.save(source.model, tmp_path_factory.mktemp("out") / "small", tokenizer=source.tokenizer)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(300, (3, 11))


def logits(folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = package.load(folder)(ids).logits
        return found


def test_dense_weights_are_a_folder_of_transformers(tdkit: Tdkit, folder: Path, ids: Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = tdkit("export", folder, "--to", "dense", "--out", tmp_path / "dense")
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not any(isinstance(module, FactorizedModule) for module in model.modules())
    assert type(model.lm_head) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits(folder, ids))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "dense")) > 0


def test_an_exported_program_takes_other_sizes(tdkit: Tdkit, folder: Path, ids: Tensor, tmp_path: Path) -> None:
    result = tdkit("export", folder, "--to", "exported", "--out", tmp_path / "model.pt2")
    assert result.code == 0, result.err
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(ids), logits(folder, ids))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="pip install onnx onnxscript onnxruntime",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_takes_other_sizes(tdkit: Tdkit, folder: Path, ids: Tensor, tmp_path: Path) -> None:
    import onnxruntime

    result = tdkit("export", folder, "--to", "onnx", "--out", tmp_path / "model.onnx")
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"input_ids": ids.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), logits(folder, ids), rtol=1e-4, atol=1e-4)


NETS = """
from torch import nn

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(24, 16, batch_first=True), nn.Linear(16, 4)
    def forward(self, x, mask=None, labels=None):
        return self.head(self.lstm(x)[0][:, -1])

class Varying(Recurrent):
    def forward(self, x, mask=None, labels=None):
        return super().forward(x) if len(x) == 3 else x
"""


@pytest.fixture
def own(tdkit: Tdkit, tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The options of a compressed model by import path, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (site / "export_nets.py").write_text(NETS, encoding="utf-8")
    save_file({"x": torch.randn(6, 5, 24), "labels": torch.arange(6) % 4}, "data.safetensors")
    done = tdkit("compress", "--model", "export_nets:Recurrent", "--budget", "0.7", "--out", "small")
    assert done.code == 0, done.err
    return "export", "--model", "export_nets:Recurrent", "--weights", "small"


def own_outputs(x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = package.load("small", model=build_model("export_nets:Recurrent").model)(x)
        return found


def test_a_model_by_import_path_is_recorded_on_a_batch(tdkit: Tdkit, own: tuple[str, ...]) -> None:
    data = ("--data", "data.safetensors", "--batch-size", "3")
    done = tdkit(*own, *data, "--to", "exported", "--out", "small.pt2")
    assert done.code == 0, done.err
    x = torch.randn(5, 5, 24)
    torch.testing.assert_close(torch.export.load("small.pt2").module()(x=x), own_outputs(x))
    done = tdkit(*own, *data[:-1], "1", "--to", "exported", "--out", "other.pt2")
    assert (done.code, "a batch of at least two examples" in done.err) == (1, True), done.err
    done = tdkit("export", "--model", "export_nets:Varying", *data, "--to", "exported", "--out", "other.pt2")
    assert done.code == 1
    assert "torch.export cannot record Varying for any number of examples" in done.err
    assert not Path("other.pt2").exists()


def test_its_dense_weights_are_a_file(tdkit: Tdkit, own: tuple[str, ...]) -> None:
    done = tdkit(*own, "--to", "dense", "--out", "dense.safetensors")
    assert done.code == 0, done.err
    x = torch.randn(5, 5, 24)
    with torch.no_grad():
        found = build_model("export_nets:Recurrent", "dense.safetensors").model(x)
    torch.testing.assert_close(found, own_outputs(x))


def test_what_cannot_be_written_is_said_first(
    tdkit: Tdkit, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tdkit("export", folder, "--to", "dense", "--out", tmp_path)
    assert (result.code, f"--out {tmp_path} exists" in result.err) == (2, True)
    monkeypatch.setattr(export, "PACKAGES", ("onnx_that_is_not_there",))
    result = tdkit("export", folder, "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert result.code == 1
    assert "--to onnx needs onnx_that_is_not_there: pip install onnx_that_is_not_there" in result.err
    monkeypatch.undo()
    monkeypatch.setattr(export, "MOST", 1000)
    result = tdkit("export", folder, "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert (result.code, "one file of less than 2 GiB" in result.err) == (2, True)
    assert list(tmp_path.iterdir()) == []
