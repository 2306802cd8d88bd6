"""Files of tensors, read and written one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tdkit
from tdkit.errors import CheckpointError
from tdkit.models.on_disk import OnDisk
from tdkit.models.shards import DTYPES, INDEX, WEIGHTS, Entry, Shards, read_tensor, weight_files, write_tensors
from tdkit.sources.on_disk import open_model
from tests.compression.streaming import start
from tests.conftest import TiedModel, make_gpt2, make_llama


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}])
def test_the_file_is_the_one_that_save_file_writes(metadata: dict[str, str], tmp_path: Path) -> None:
    tensors = {f"{number}.{dtype}": (torch.randn(3, 5) * 9).to(dtype) for number in (0, 1) for dtype in DTYPES.values()}
    tensors |= {'a "quoted" ä': torch.zeros(0, 3), "scalar": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "theirs", metadata=metadata or None)
    write_tensors(tmp_path / "ours", {name: Entry.of(tensor) for name, tensor in tensors.items()}, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_of_any_strides_are_written_and_read_with_others(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    write_tensors(tmp_path / "file", {"x": Entry.of(tensor)}, {})
    assert torch.equal(load_file(tmp_path / "file")["x"], tensor)
    shards = Shards([tmp_path / "file"])
    assert torch.equal(shards.read("x", stride=(1, 4)), tensor)
    assert shards.read("x", stride=(1, 4)).stride() == (1, 4)
    assert shards.read("x", torch.float64).dtype == torch.float64
    assert torch.equal(read_tensor(tmp_path / "file", "x"), tensor)


def test_what_was_announced_must_come(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x was announced as torch\.float32 \(2,\) and is"):
        write_tensors(tmp_path / "file", {"x": Entry(torch.float32, (2,), lambda: torch.zeros(3))}, {})
    with pytest.raises(CheckpointError, match=r"hold no torch\.complex128"):
        write_tensors(tmp_path / "file", {"x": Entry.of(torch.zeros(3, dtype=torch.complex128))}, {})


def test_folders_without_files_of_tensors_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor .*save_pretrained"):
        weight_files(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="are no names of files"):
        weight_files(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"holds no part\.safetensors: the copy is incomplete"):
        weight_files(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\x09")
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        Shards(weight_files(tmp_path))


def saved(model: torch.nn.Module, folder: Path) -> Shards:
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
    return Shards(weight_files(folder))


def test_files_of_another_model_are_told(tmp_path: Path) -> None:
    shards = saved(TiedModel(width=24), tmp_path)
    with pytest.raises(CheckpointError, match=r"hold up\.weight as \(48, 24\), the model as \(32, 16\)"):
        OnDisk(TiedModel(width=16).to("meta"), shards)
    other = torch.nn.Sequential(torch.nn.Linear(2, 2)).to("meta")
    with pytest.raises(CheckpointError, match=r"lack 0\.weight; lack 0\.bias; have .*, which the model lacks"):
        OnDisk(other, shards)


def test_a_tie_that_the_files_break_is_told(tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["lm_head.weight"] = torch.zeros(60, 32)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"are one tensor in this model, two in the files of .*tie_word_embeddings"
    ):
        open_model(tmp_path)


def test_a_folder_with_code_is_refused(tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    for change in (
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"},
        {"architectures": ["Evil"]},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(tdkit.TdkitError, match=r"code of its own|readable config"):
            open_model(tmp_path)


LOAD = """
import resource, sys, torch
import tdkit
torch.set_num_threads(1)
tdkit.load(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = tdkit.load(sys.argv[2])
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_loading_takes_the_memory_of_the_model(tmp_path: Path) -> None:
    policy = tdkit.Policy([tdkit.Rule("*.up_proj", tdkit.LowRank(rank=4))])
    tdkit.save(tdkit.compress(make_llama(), policy), tmp_path / "small")
    large = tdkit.compress(make_llama(hidden_size=512, intermediate_size=4096, num_hidden_layers=8), policy)
    size = sum(parameter.numel() * parameter.element_size() for parameter in large.parameters())
    assert size > 100e6
    tdkit.save(large, tmp_path / "large")
    done = start(LOAD, tmp_path / "small", tmp_path / "large")
    printed, errors = done.communicate()
    assert done.returncode == 0, errors
    assert int(printed) < 1.25 * size


def test_a_load_reads_every_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tdkit.save(tdkit.compress(make_gpt2(), tdkit.Policy([tdkit.Rule("*", tdkit.LowRank(rank=2))])), tmp_path)
    seen: list[str] = []
    mapped = Shards.mapped

    def noted(self: Shards, name: str) -> torch.Tensor:
        seen.append(name)
        return mapped(self, name)

    monkeypatch.setattr(Shards, "mapped", noted)
    tdkit.load(folder)
    assert len(seen) == len(set(seen)) > 20
