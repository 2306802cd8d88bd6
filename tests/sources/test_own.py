"""Models and batches by import path, and batches of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import CheckpointError, SourceError
from tdkit.sources.own import build_model, load_batches

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)
        self.tied = self.body
    def forward(self, x):
        return self.head(torch.relu(self.body(x)))

made = Net()

def build():
    torch.manual_seed(3)
    return Net().train()

def wide():
    return Net(32)

def number():
    return 3

def fails():
    raise RuntimeError("no such luck")

def batches():
    for _ in range(3):
        yield torch.ones(4, 16), torch.zeros(4, dtype=torch.long)

listed = [torch.ones(2, 16)]
one = torch.ones(2, 16)
"""


@pytest.fixture(autouse=True)
def nets(site: Path) -> None:
    (site / "own_nets.py").write_text(CODE, encoding="utf-8")


@pytest.mark.parametrize("name", ["build", "Net", "made"])
def test_functions_classes_and_modules_are_models(name: str) -> None:
    source = build_model(f"own_nets:{name}", dtype=torch.float64)
    assert type(source.model).__name__ == "Net"
    assert not source.model.training
    assert source.model.head.weight.dtype == torch.float64
    assert source.tokenizer is None
    assert source.name == f"own_nets:{name}"


def test_weights_are_those_of_a_file_tied_ones_too(tmp_path: Path) -> None:
    trained = build_model("own_nets:Net").model
    save_model(trained, str(tmp_path / "net.safetensors"))
    source = build_model("own_nets:build", tmp_path / "net.safetensors")
    assert torch.equal(source.model.body.weight, trained.body.weight)
    assert source.model.tied is source.model.body
    assert source.name == str(tmp_path / "net.safetensors")


def test_weights_are_those_of_a_compressed_folder(tmp_path: Path) -> None:
    model = tdkit.compress(build_model("own_nets:build").model, Policy([Rule("body", LowRank(rank=3))]))
    tdkit.save(model, tmp_path / "smaller")
    again = build_model("own_nets:build", tmp_path / "smaller").model
    x = torch.randn(3, 16)
    assert torch.equal(again(x), model(x))
    with pytest.raises(CheckpointError, match="layer body is 16x16 in the file, 32x32 in this model"):
        build_model("own_nets:wide", tmp_path / "smaller")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_nets", "is no import path: give MODULE:NAME"),
        ("no_such_module:build", "importing no_such_module failed: ModuleNotFoundError"),
        ("own_nets:biuld", "own_nets has no 'biuld'; did you mean 'build'"),
        ("own_nets:number", "gives a int, not a torch.nn.Module"),
        ("own_nets:fails", "'own_nets:fails' failed: RuntimeError: no such luck"),
    ],
)
def test_what_is_no_model_is_told(path: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        build_model(path)


def test_what_are_not_its_weights_is_told(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "net.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    save_model(build_model("own_nets:wide").model, str(tmp_path / "wide.safetensors"))
    for name, message in {
        "absent.safetensors": "no weights",
        "net.pt": "tdkit reads no pickle",
        "damaged.safetensors": "does not hold the weights of 'own_nets:build'",
        "wide.safetensors": "size mismatch",
    }.items():
        with pytest.raises(SourceError, match=message):
            build_model("own_nets:build", tmp_path / name)


def examples(count: int = 10) -> dict[str, torch.Tensor]:
    return {"inputs": torch.randn(count, 16), "labels": torch.arange(count) % 5}


@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_files_are_divided_into_batches(form: str, tmp_path: Path) -> None:
    data = examples()
    file = tmp_path / f"data.{form}"
    if form == "npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in data.items()})
    else:
        save_file(data, file)
    batches = list(load_batches(str(file), batch=4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), data["inputs"])
    assert torch.equal(torch.cat([labels for _, labels in batches]), data["labels"])


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    parts = [examples(3), examples(5)]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"part-{number}.safetensors")
    (tmp_path / "README.md").touch()
    batches = list(load_batches(str(tmp_path), batch=8))
    assert [len(labels) for _, labels in batches] == [3, 5]
    assert torch.equal(batches[1][0], parts[1]["inputs"])


def test_other_names_are_the_arguments_of_forward(tmp_path: Path) -> None:
    save_file({"input_ids": torch.ones(3, 4, dtype=torch.long)}, tmp_path / "ids.safetensors")
    (batch,) = load_batches(str(tmp_path / "ids.safetensors"))
    assert list(batch) == ["input_ids"]
    save_file({"inputs": torch.ones(3, 4)}, tmp_path / "inputs.safetensors")
    (batch,) = load_batches(str(tmp_path / "inputs.safetensors"))
    assert torch.equal(batch, torch.ones(3, 4))


def test_batches_of_a_function_can_be_gone_through_twice() -> None:
    found = load_batches("own_nets:batches")
    assert len(list(found)) == len(list(found)) == 3
    assert len(list(load_batches("own_nets:listed"))) == 1


def test_what_is_no_data_is_told(tmp_path: Path) -> None:
    (tmp_path / "data.txt").touch()
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "objects.npz", inputs=np.array([{}, {}], dtype=object))
    save_file({"inputs": torch.ones(3, 1), "labels": torch.ones(2)}, tmp_path / "uneven.safetensors")
    save_file({"inputs": torch.ones(3, 1), "mask": torch.ones(3)}, tmp_path / "mixed.safetensors")
    for spec, message in {
        "nowhere.npz": "no data 'nowhere.npz'",
        str(tmp_path / "data.txt"): "is none of .safetensors, .npz",
        str(tmp_path / "empty"): "holds no .safetensors or .npz files",
        str(tmp_path / "objects.npz"): "allow_pickle",
        str(tmp_path / "uneven.safetensors"): r"equally many rows.*inputs \(3, 1\), labels \(2,\)",
        str(tmp_path / "mixed.safetensors"): "holds 'inputs' and mask",
        "own_nets:number": "gives a int, not an iterable of batches",
        "own_nets:one": "gives a Tensor, not an iterable of batches",
    }.items():
        with pytest.raises(SourceError, match=message):
            load_batches(spec)
