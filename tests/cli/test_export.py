"""``tdkit export``: what it writes computes as the compressed model does."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdkit as package
from tdkit.cli import exporting as export
from tdkit.models.hosts.base import FactorizedModule
from tdkit.sources.models import load_model
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
