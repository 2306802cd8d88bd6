"""Models inside wrappers and of a user's own classes are saved under plain names, with what loads them again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2LMHeadModel

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import CheckpointError
from tdkit.models.sites import num_params
from tdkit.support.compatibility import reset_accelerate_state
from tests.conftest import make_gpt2
from tests.together import run_together

half = Policy([Rule("*", LowRank())], budget=0.6)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of this process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["wrapped first", "compressed first"])
def test_a_compiled_model(order: str, tmp_path: Path) -> None:
    model = make_gpt2()
    wrapped: Any = torch.compile(model, backend="eager")
    tdkit.compress(wrapped if order == "wrapped first" else model, half)
    tdkit.save(wrapped, tmp_path / "wrapped")
    assert files(tmp_path / "wrapped") == files(tdkit.save(model, tmp_path / "plain"))
    model.save_pretrained(tmp_path / "pretrained")
    assert files(tmp_path / "wrapped") == files(tmp_path / "pretrained")


def test_data_parallel_models(alone: None, ids: Tensor, tmp_path: Path) -> None:
    model = tdkit.compress(make_gpt2(), half)
    plain = files(tdkit.save(model, tmp_path / "plain"))
    wrapped: Any = DistributedDataParallel(model)
    assert files(tdkit.save(wrapped, tmp_path / "ddp")) == plain
    assert files(tdkit.save(torch.compile(wrapped, backend="eager"), tmp_path / "both")) == plain  # type: ignore[arg-type]
    assert files(tdkit.save(nn.DataParallel(model), tmp_path / "dp")) == plain
    expected = model(ids).logits
    loaded: Any = tdkit.load(tmp_path / "ddp", model=DistributedDataParallel(make_gpt2()))
    assert torch.equal(loaded(ids).logits, expected)
    assert torch.equal(loaded.module(ids).logits, expected)


def test_a_model_prepared_by_accelerate(tmp_path: Path) -> None:
    model = tdkit.compress(make_gpt2(), half)
    plain = files(tdkit.save(model, tmp_path / "plain"))
    reset_accelerate_state(processes=True)  # of an earlier test
    try:
        wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        assert files(tdkit.save(wrapped, tmp_path / "prepared")) == plain
    finally:
        reset_accelerate_state(processes=True)


def test_a_model_sharded_by_fsdp_is_gathered(tmp_path: Path) -> None:
    model = tdkit.compress(make_gpt2(), half)
    plain = files(tdkit.save(model, tmp_path / "plain"))
    program = """
    import tdkit
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tdkit.load(folder / "plain")
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # fully_shard takes no others
    mesh = init_device_mesh("cpu", (count,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tdkit.save(model, folder / "sharded")
    distributed.barrier()
    """
    run_together(tmp_path, program)
    assert files(tmp_path / "sharded") == plain


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of peft
def test_adapters_are_merged_first(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tdkit.compress(make_gpt2(), Policy([Rule("*.mlp.*", LowRank(rank=4))]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(CheckpointError, match=r"holds adapters of PEFT: merge them, model.merge_and_unload\(\)"):
        tdkit.save(adapted, tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()
    merged = adapted.merge_and_unload()
    folder = tdkit.save(merged, tmp_path / "merged")
    loaded: Any = tdkit.load(folder)
    assert {name.partition(".")[0] for name, _ in loaded.named_parameters()} == {"transformer"}
    assert loaded.state_dict().keys() == merged.state_dict().keys()


class OwnGPT2(GPT2LMHeadModel):
    """A user's own subclass, with a layer more."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.n_embd, config.vocab_size)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs, output_hidden_states=True)
        output.logits = output.logits + self.gate(output.hidden_states[-1])
        return output


@pytest.mark.parametrize("how", ["class", "path", "model", "from_pretrained"])
def test_a_class_of_one_s_own(how: str, ids: Tensor, tmp_path: Path) -> None:
    model = OwnGPT2(make_gpt2().config).eval()
    expected = tdkit.compress(model, half)(ids).logits
    folder = tdkit.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "pretrained")
    assert files(tmp_path / "pretrained") == files(folder)
    if how == "from_pretrained":
        loaded: Any = OwnGPT2.from_pretrained(folder)
    elif how == "model":
        loaded = tdkit.load(folder, model=OwnGPT2(make_gpt2().config))
    else:
        loaded = tdkit.load(folder, class_=OwnGPT2 if how == "class" else f"{__name__}:OwnGPT2")
    assert type(loaded) is OwnGPT2
    assert torch.equal(loaded(ids).logits, expected)
    assert num_params(loaded) == num_params(model)


def test_a_class_of_one_s_own_is_never_found_by_a_name_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OwnGPT2(make_gpt2().config).eval()
    folder = tdkit.save(tdkit.compress(model, half), tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"holds a .*:OwnGPT2, a class of your own: .*class_='.*:OwnGPT2'"):
        tdkit.load(folder)
    (tmp_path / "trap.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for kind in ("subclass", "transformers", "module"):
        config["quantization_config"]["model"] = {"kind": kind, "class": "trap:OwnGPT2"}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="trap:OwnGPT2"):
            tdkit.load(folder)
    assert "trap" not in sys.modules


@pytest.mark.parametrize(
    ("class_", "message"),
    [
        ("no_such_module:Class", "class_='no_such_module:Class' cannot be imported: No module named"),
        ("transformers:NoSuchClass", "class_='transformers:NoSuchClass' cannot be imported"),
        ("torch.nn:Linear", "class_='torch.nn:Linear' is no subclass of transformers.PreTrainedModel: build the model"),
        (nn.Linear, "is no subclass of transformers.PreTrainedModel"),
    ],
)
def test_wrong_classes_are_told(class_: Any, message: str, gpt2: Any, tmp_path: Path) -> None:
    folder = tdkit.save(tdkit.compress(gpt2, half), tmp_path / "saved")
    with pytest.raises(CheckpointError, match=message):
        tdkit.load(folder, class_=class_)
    with pytest.raises(CheckpointError, match="give model= or class_=, not both"):
        tdkit.load(folder, class_=class_, model=make_gpt2())


def test_a_folder_cannot_choose_code(gpt2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose config names Python files of its own, and questions on the terminal."""

    def asked(*_: Any) -> str:
        raise AssertionError("a question was asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    gpt2.config.auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = tdkit.save(tdkit.compress(gpt2, half), tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "evil.Config"
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    for name in ("evil.py", "configuration_evil.py"):
        (folder / name).write_text("raise SystemExit('executed')")
    assert type(tdkit.load(folder)) is transformers.GPT2LMHeadModel
    source = tdkit_source(folder)
    assert type(source.model) is transformers.GPT2LMHeadModel
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks a readable config.json"):
        tdkit.load(folder)


def tdkit_source(folder: Path) -> Any:
    from tdkit.sources import load_model

    return load_model(str(folder))
