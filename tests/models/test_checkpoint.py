"""save and load: bit-identical, whole or not at all, and every damage is told."""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.decompositions.registered import decompositions
from tdkit.errors import CheckpointError
from tdkit.models.checkpoint import DESCRIPTION, WEIGHTS, read_description
from tdkit.models.checkpoint.description import digest
from tdkit.models.sites import num_params
from tests.conftest import TiedModel, make_gpt2, make_llama
from tests.kinds import OF_MATRICES

every = pytest.mark.parametrize("name", OF_MATRICES)


def half(name: str = "low_rank") -> Policy:
    return Policy([Rule("*", decompositions.get(name)())], budget=0.6)


def fresh(tied: Any) -> Any:
    """A dense model of the same class with other weights."""
    return type(tied)()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def saved(tied: Any, tmp_path: Path) -> Path:
    return tdkit.save(tdkit.compress(tied, half()), tmp_path / "saved")


@every
def test_any_module_round_trips_bit_for_bit(name: str, tied: Any, ids: Tensor, tmp_path: Path) -> None:
    expected = tdkit.compress(tied, half(name))(ids)
    folder = tdkit.save(tied, tmp_path / "saved")
    assert folder == tmp_path / "saved"
    loaded = tdkit.load(folder, model=fresh(tied))
    assert torch.equal(loaded(ids), expected)
    assert loaded.embed.matrix is loaded.head.matrix
    assert tdkit.applied_plan(loaded) == tdkit.applied_plan(tied)
    assert not loaded.training


@every
def test_gpt2_round_trips_bit_for_bit_and_generates(name: str, gpt2: Any, ids: Tensor, tmp_path: Path) -> None:
    tdkit.compress(gpt2, half(name))
    gpt2.generation_config.max_new_tokens = 6
    expected, text = gpt2(ids).logits, gpt2.generate(ids, do_sample=False, pad_token_id=0)
    folder = tdkit.save(gpt2, tmp_path / "saved")
    loaded: Any = tdkit.load(folder)
    assert type(loaded) is type(gpt2)
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.generation_config.max_new_tokens == 6
    assert torch.equal(loaded.generate(ids, do_sample=False, pad_token_id=0), text)
    assert loaded.transformer.wte.matrix is loaded.lm_head.matrix
    loaded.tie_weights()
    assert torch.equal(loaded(ids).logits, expected)
    again = tdkit.save(loaded, tmp_path / "again")
    assert tree(again)[WEIGHTS] == tree(folder)[WEIGHTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_llama_round_trips_in_every_dtype(dtype: torch.dtype, llama: Any, ids: Tensor, tmp_path: Path) -> None:
    llama.to(dtype)  # its rotary frequencies, which no file holds, are rounded too
    tdkit.compress(llama, half())
    expected = llama(ids).logits
    loaded: Any = tdkit.load(tdkit.save(llama, tmp_path / "saved"))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(ids).logits, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_travels(attention: str, llama: Any, ids: Tensor, tmp_path: Path) -> None:
    llama.set_attn_implementation(attention)
    expected = tdkit.compress(llama, half())(ids).logits
    loaded: Any = tdkit.load(tdkit.save(llama, tmp_path / "saved"))
    assert loaded.config._attn_implementation == attention
    assert torch.equal(loaded(ids).logits, expected)


def test_a_model_without_factors_round_trips(gpt2: Any, ids: Tensor, tmp_path: Path) -> None:
    loaded: Any = tdkit.load(tdkit.save(gpt2, tmp_path / "saved"))
    assert torch.equal(loaded(ids).logits, gpt2(ids).logits)


def test_mixed_dtypes_buffers_and_views_round_trip(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 12).to(torch.bfloat16)
            self.norm = nn.BatchNorm1d(12)
            base = torch.randn(4, 6)
            self.register_buffer("part", base[:, 1:4])  # strided views of one storage
            self.register_buffer("rest", base[:, 4:])
            self.register_buffer("flags", torch.tensor([True, False]))
            self.register_buffer("nothing", torch.empty(0, 3))

    model = Mixed()
    tdkit.compress(model, Policy([Rule("fc", LowRank(rank=2))]))
    loaded = tdkit.load(tdkit.save(model, tmp_path / "saved"), model=Mixed())
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def test_ties_are_written_once(saved: Path, tied: Any) -> None:
    with safe_open(saved / WEIGHTS, framework="pt") as file:
        total = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118, not a dict
    assert total == num_params(tied)


def test_a_block_that_is_used_twice_round_trips(tmp_path: Path) -> None:
    class Shared(nn.Module):
        """One block under two names, as in ALBERT."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12))
            self.second = self.first
            self.norm = nn.LayerNorm(12)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.second(self.first(x)))
            return y

    model, x = Shared(), torch.randn(3, 12)
    expected = tdkit.compress(model, half())(x)
    assert model.first is model.second
    assert len(tdkit.applied_plan(model)) == 2
    folder = tdkit.save(model, tmp_path / "saved")
    loaded = tdkit.load(folder, model=Shared())
    assert torch.equal(loaded(x), expected)
    other = Shared()
    other.norm = nn.LayerNorm(13)
    modules = dict(other.named_modules(remove_duplicate=False))
    with pytest.raises(CheckpointError, match=r"holds norm.weight as \(12,\), the model as \(13,\)"):
        tdkit.load(folder, model=other)
    assert dict(other.named_modules(remove_duplicate=False)) == modules


def test_padding_survives_a_round_trip(tmp_path: Path) -> None:
    model = nn.ModuleDict({"look": nn.Embedding(20, 12, padding_idx=3)})
    tdkit.compress(model, Policy([Rule("look", LowRank(rank=2))]))
    dense = nn.ModuleDict({"look": nn.Embedding(20, 12, padding_idx=3)})
    loaded = tdkit.load(tdkit.save(model, tmp_path / "saved"), model=dense)
    ids = torch.tensor([3, 4])
    assert not loaded["look"](ids)[0].any()  # type: ignore[index]
    assert torch.equal(loaded["look"](ids), model["look"](ids))  # type: ignore[index]


def test_config_and_tokenizer_travel(gpt2: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?")
    folder = tdkit.save(tdkit.compress(gpt2, half()), tmp_path / "saved", tokenizer=tokenizer)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    assert AutoTokenizer.from_pretrained(folder)("a b zzz")["input_ids"] == [0, 1, 2]


def test_an_existing_folder_is_respected(tied: Any, saved: Path, tmp_path: Path) -> None:
    before = tree(saved)
    with pytest.raises(CheckpointError, match="holds a saved model: pass overwrite=True, or give a new folder"):
        tdkit.save(tied, saved)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"other holds other files: give a new folder"):
            tdkit.save(tied, other, overwrite=overwrite)
    with pytest.raises(CheckpointError, match=r"thesis.txt is a file: give a folder"):
        tdkit.save(tied, other / "thesis.txt")
    assert tree(saved) == before
    assert tree(other) == {"thesis.txt": b"years of work"}
    empty = tmp_path / "empty"
    empty.mkdir()
    tdkit.save(tied, empty)
    tdkit.save(tied, saved, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "other", "saved"]


class Interrupting:
    """A tokenizer that is stopped while it is written."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt


def test_an_interrupted_save_leaves_the_old_one_and_no_litter(tied: Any, saved: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tdkit.save(fresh(tied), saved, overwrite=True, tokenizer=Interrupting())
    assert tree(tmp_path) == before
    with pytest.raises(KeyboardInterrupt):
        tdkit.save(tied, tmp_path / "new", tokenizer=Interrupting())
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def change(folder: Path, **entries: Any) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), r"holds no model.safetensors: the copy is incomplete"),
        (lambda f: (f / DESCRIPTION).unlink(), r"holds no tdkit.json, .* it was not saved by tdkit"),
        (lambda f: cut(f / WEIGHTS, 1000), r"model.safetensors is damaged or truncated"),
        (lambda f: cut(f / WEIGHTS, 0), r"model.safetensors is damaged or truncated"),
        (
            lambda f: flip(f / WEIGHTS, -1),
            r"is not the file that was saved \(its SHA-256 .*copy it again, or pass verify=False",
        ),
        (lambda f: cut(f / DESCRIPTION, 50), r"tdkit.json is damaged"),
        (lambda f: (f / DESCRIPTION).write_bytes(b"\xff\xfe\x00"), r"tdkit.json is damaged"),
        (lambda f: (f / DESCRIPTION).write_text('{"model_type": "gpt2"}'), r"tdkit.json is not a tdkit description"),
        (lambda f: (f / DESCRIPTION).write_text("[]"), r"is not a tdkit description"),
        (lambda f: change(f, version=99), r"has format version 99, this tdkit reads up to 2: update tdkit"),
        (lambda f: change(f, version="one"), r"has format version 'one'"),
        (lambda f: change(f, version=-1), r"has format version -1"),
        (lambda f: change(f, version=True), r"has format version True"),
        (lambda f: change(f, layers=None), r"is damaged: 'layers' is missing or malformed"),
        (lambda f: change(f, sha256=7), r"is damaged: 'sha256' is missing or malformed"),
        (lambda f: change(f, layers=[3]), r"tdkit.json: layer 0: 3 is not a layer"),
        (lambda f: change(f, layers=[]), r"model.safetensors lacks embed.weight"),
        (lambda f: change(f, ties={"head.matrix.left": "nowhere"}), r"ties head.matrix.left to nowhere"),
    ],
)
def test_damage_is_told_and_the_given_model_is_left_alone(damage: Any, message: str, saved: Path, tied: Any) -> None:
    damage(saved)
    model = fresh(tied)
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        tdkit.load(saved, model=model)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_without_verification_a_truncated_file_is_still_told(saved: Path, tied: Any) -> None:
    for size in (1000, 4, 0):
        cut(saved / WEIGHTS, size)
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or truncated"):
            tdkit.load(saved, model=fresh(tied), verify=False)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node of a JSON value."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@pytest.mark.parametrize("value", [None, -1, 10**6, True, "x", [], {}, ["x"], {"x": 1}], ids=str)
def test_no_change_of_the_description_gives_anything_but_our_error_or_the_model(
    value: Any, tied: Any, ids: Tensor, tmp_path: Path
) -> None:
    """Every node of tdkit.json in turn takes another value."""
    rules = [Rule("embed", LowRank(rank=4)), Rule("up", "kronecker"), Rule("down", "tt_matrix")]  # type: ignore[arg-type]
    expected = tdkit.compress(tied, Policy(rules, budget=0.6))(ids)
    folder = tdkit.save(tied, tmp_path / "saved")
    text = (folder / DESCRIPTION).read_text()
    told = 0
    for path in places(json.loads(text)):
        description = json.loads(text)
        node = description
        for key in path[:-1]:
            node = node[key]
        if node[path[-1]] == value:
            continue
        node[path[-1]] = value
        (folder / DESCRIPTION).write_text(json.dumps(description))
        try:
            loaded = tdkit.load(folder, model=fresh(tied))
        except CheckpointError:
            told += 1
        except Exception as error:
            raise AssertionError(f"{path} = {value!r}: {type(error).__name__}: {error}") from error
        else:
            assert torch.equal(loaded(ids), expected), f"{path} = {value!r} loads another model"
    assert told > 20


def test_a_missing_folder_and_a_foreign_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        tdkit.load(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError,
        match=r"holds no tdkit.json, nor a config.json of a compressed model: it was not saved by tdkit",
    ):
        tdkit.load(tmp_path)


def test_a_decomposition_that_is_not_installed_is_told(saved: Path, tied: Any) -> None:
    description = read_description(saved)
    description["layers"][0]["decomposition"] = {"low_rnk": {"rank": 3}}
    change(saved, layers=description["layers"])
    message = r"tdkit.json: layer 0: unknown decomposition 'low_rnk'; did you mean 'low_rank'\?"
    with pytest.raises(CheckpointError, match=message):
        tdkit.load(saved, model=fresh(tied))


def test_a_model_of_ones_own_must_be_given(saved: Path) -> None:
    message = r"holds a .*TiedModel, which is not a transformers model: .*tdkit.load\(folder, model=fresh\)"
    with pytest.raises(CheckpointError, match=message):
        tdkit.load(saved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tied: nn.Sequential(nn.Linear(2, 2)), r"this model has no layer embed: it is another architecture"),
        (lambda tied: type(tied)(vocabulary=41), r"layer embed is 40x24 in the file, 41x24 in this model"),
        (lambda tied: type(tied)(width=26), r"layer embed is 40x24 in the file, 40x26 in this model"),
        (lambda tied: tied, r"layer embed is a FactorizedEmbedding in this model, not one that tdkit rewrites"),
    ],
)
def test_the_wrong_model_is_told(make: Any, message: str, saved: Path, tied: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        tdkit.load(saved, model=make(tied))


def test_other_weights_that_do_not_fit_are_told_by_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(12, 12), "norm": nn.LayerNorm(12)})
    folder = tdkit.save(tdkit.compress(model, half()), tmp_path / "saved")
    other = nn.ModuleDict({"fc": nn.Linear(12, 12), "norm": nn.LayerNorm(13), "more": nn.Linear(2, 2)})
    with pytest.raises(
        CheckpointError, match=r"lacks more.weight; lacks more.bias; holds norm.weight as \(12,\), the model as \(13,\)"
    ):
        tdkit.load(folder, model=other)


def test_two_tensors_are_not_read_into_one(tmp_path: Path, tied: Any) -> None:
    model = fresh(tied)
    model.head.weight = nn.Parameter(torch.randn(40, 24))
    folder = tdkit.save(model, tmp_path / "saved")
    with pytest.raises(
        CheckpointError, match=r"head.weight and embed.weight are one tensor in this model, two in the file"
    ):
        tdkit.load(folder, model=fresh(tied))


def test_a_model_on_the_meta_device_takes_what_the_file_has(
    saved: Path, tied: Any, ids: Tensor, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = fresh(tied)
    loaded = tdkit.load(saved, model=model)
    assert loaded is model
    assert torch.equal(loaded(ids), tied(ids))
    assert num_params(loaded) == num_params(tied)
    with torch.device("meta"):
        model = fresh(tied)
    with pytest.raises(CheckpointError, match=r"cannot save .*it is on the meta device and has no values"):
        tdkit.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_no_file_holds_is_not_made_up(llama: Any, ids: Tensor, tmp_path: Path) -> None:
    expected = tdkit.compress(llama, half())(ids).logits
    folder = tdkit.save(llama, tmp_path / "saved")
    with torch.device("meta"):
        model = make_llama()
    with pytest.raises(
        CheckpointError, match=r"inv_freq.* is on the meta device, and no file holds it: build the model"
    ):
        tdkit.load(folder, model=model)
    assert all(parameter.is_meta for parameter in model.parameters())
    with init_empty_weights(include_buffers=False):
        model = make_llama()
    assert torch.equal(tdkit.load(folder, model=model)(ids).logits, expected)


def test_extra_state_that_is_no_tensor_is_told(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"counter": 3}

    with pytest.raises(
        CheckpointError, match=r"cannot save 'fc._extra_state': extra state of type dict is not a tensor"
    ):
        tdkit.save(nn.ModuleDict({"fc": Extra(2, 2)}), tmp_path / "saved")


def test_a_transformers_folder_without_its_config_is_told(gpt2: Any, tmp_path: Path) -> None:
    folder = tdkit.save(tdkit.compress(gpt2, half()), tmp_path / "saved")
    path = folder / "config.json"
    text = path.read_text()
    described = {"quantization_config": json.loads(text)["quantization_config"]}
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    for damaged in ({"model_type": "no_such"}, {"auto_map": {"AutoConfig": "evil.Config"}}, {}):
        path.write_text(json.dumps({**damaged, **described}))
        with pytest.raises(CheckpointError, match=r"lacks a readable config.json"):
            tdkit.load(folder)
    for damaged in ("", "{", "[]"):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"it was not saved by tdkit"):
            tdkit.load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"it was not saved by tdkit"):
        tdkit.load(folder)
    for name in ("NoSuchModel", "GPT2Config", "os", "__builtins__", 3):
        config = json.loads(text)
        config["quantization_config"]["model"]["class"] = name
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=rf"this transformers \(.*\) has no model class '{name}'"):
            tdkit.load(folder)


def test_loading_unpickles_and_executes_nothing(gpt2: Any, tmp_path: Path) -> None:
    """In a process of its own, which ends at once when anything is unpickled, compiled or run as a program."""
    folder = tdkit.save(tdkit.compress(gpt2, half()), tmp_path / "saved")
    code = f"""
import sys, torch, transformers, tdkit
from transformers import GPT2LMHeadModel, AutoConfig
tdkit.load({str(folder)!r})  # everything is imported now
def watch(event, args):
    if event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "socket.connect"):
        print("FORBIDDEN", event, args, flush=True)
        import os; os._exit(3)
sys.addaudithook(watch)
tdkit.load({str(folder)!r})
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("loaded")


def test_where_the_model_is_put(saved: Path, tied: Any) -> None:
    loaded = tdkit.load(saved, model=fresh(tied), device="cpu")
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


@pytest.mark.parametrize("damage", ["buffers", "dtype", "generation"])
def test_a_load_that_fails_leaves_every_value_of_the_caller_s_model(
    damage: str, gpt2: Any, tied: Any, tmp_path: Path
) -> None:
    model = gpt2 if damage == "generation" else tied
    own = make_gpt2() if damage == "generation" else fresh(tied)
    folder = tdkit.save(tdkit.compress(model, half()), tmp_path / "saved")
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(1.0)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    modules = dict(own.named_modules())
    if damage == "generation":
        (folder / "generation_config.json").write_text("{", encoding="utf-8")
    else:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        description["buffers"] = [] if damage == "buffers" else {"x": "no_dtype"}
        (folder / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is damaged"):
        tdkit.load(folder, model=own)
    assert dict(own.named_modules()) == modules
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, before[name])


@dataclass(frozen=True, kw_only=True)
class Unregistered(LowRank):
    name: ClassVar[str] = "unregistered"


@dataclass(frozen=True, kw_only=True)
class Impostor(LowRank):
    """Calls itself what tdkit's own is called."""

    scale: float = 1.0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Unregistered(rank=2), "up: Unregistered could not be read again .* unknown decomposition 'unregistered'"),
        (Impostor(rank=2), "up: Impostor would be read again as another decomposition, LowRank"),
        (Impostor(rank=2, scale=2.0), "up: Impostor could not be read again .* unknown option 'scale'"),
    ],
    ids=["unregistered", "other class", "other options"],
)
def test_what_could_not_be_loaded_is_not_saved(kind: LowRank, said: str, tied: Any, tmp_path: Path) -> None:
    tdkit.compress(tied, Policy([Rule("up", kind)]))
    with pytest.raises(CheckpointError, match=said):
        tdkit.save(tied, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", [1, 2])
def test_a_transformers_folder_of_every_format_loads(version: int) -> None:
    folder = Path(__file__).parent / "golden" / f"format-{version}"
    assert read_description(folder)["version"] == version
    model = tdkit.load(folder)
    assert {step.decomposition.name for step in tdkit.applied_plan(model).rewritten if step.decomposition} == {
        "kronecker",
        "low_rank",
        "permuted_kronecker",
        "tt_matrix",
    }
    with torch.inference_mode():
        logits = model(torch.arange(12).reshape(1, 12)).logits
    expected = torch.tensor(json.loads((folder / "logits.json").read_text(encoding="utf-8")))
    torch.testing.assert_close(logits[0, :, :8], expected, rtol=1e-4, atol=1e-5)
    assert model.lm_head.matrix is model.transformer.wte.matrix


@pytest.mark.parametrize("version", [1, 2])
def test_a_module_of_every_format_loads(version: int) -> None:
    folder = Path(__file__).parent / "golden" / f"format-{version}-module"
    assert read_description(folder)["version"] == version
    model = tdkit.load(folder, model=TiedModel(12, 8))
    expected = torch.tensor(json.loads((folder / "outputs.json").read_text(encoding="utf-8")))
    torch.testing.assert_close(model(torch.arange(12).reshape(1, 12))[0], expected)
    assert model.head.matrix is model.embed.matrix


@pytest.mark.parametrize("whole", [False, True], ids=["module", "transformers"])
def test_a_model_with_nan_loads(whole: bool, tied: Any, gpt2: Any, tmp_path: Path) -> None:
    model = gpt2 if whole else tied
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan  # of a tied weight
    folder = tdkit.save(model, tmp_path / "saved")
    loaded = tdkit.load(folder, model=None if whole else fresh(tied))
    assert bool(next(loaded.parameters())[0, 0].isnan())


def permuted(tmp_path: Path, model: Any) -> Path:
    kind = tdkit.PermutedKronecker(terms=1, a=(6, 6))
    tdkit.compress(model, Policy([Rule("up", kind)]))
    return tdkit.save(model, tmp_path / "permuted")


def rewritten(folder: Path, name: str, change: Any) -> None:
    """Change a tensor of the file, and its digest in the description."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}  # no view of the file
    key = next(each for each in tensors if each.endswith(name))
    tensors[key] = change(tensors[key])
    save_file(tensors, folder / WEIGHTS)
    path = folder / DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": digest(tensors)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda order: order.clone().fill_(order[0]), "column_source is no permutation of 0 to 23"),
        (lambda order: order + 1, "column_source is no permutation of 0 to 23"),
        (lambda order: order.float(), "column_source as torch.float32, the model as torch.int32"),
        (lambda order: order.long(), "column_source holds torch.int64, not torch.int32"),
    ],
    ids=["repeated", "out of range", "floats", "another width"],
)
def test_permutations_are_permutations(change: Any, message: str, tied: Any, tmp_path: Path) -> None:
    folder = permuted(tmp_path, tied)
    rewritten(folder, "column_source", change)
    with pytest.raises(CheckpointError, match=message):
        tdkit.load(folder, model=fresh(tied))


def test_from_pretrained_checks_permutations_too(gpt2: Any, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    tdkit.compress(gpt2, Policy([Rule("*.0.mlp.c_fc", tdkit.PermutedKronecker(terms=1, a=(8, 8)))]))
    folder = tdkit.save(gpt2, tmp_path / "permuted")
    path = folder / WEIGHTS
    tensors = load_file(path)
    key = next(each for each in tensors if each.endswith("row_order"))
    for changed, message in ((tensors[key] * 0, "no permutation"), (tensors[key].float(), "F32")):
        save_file({**tensors, key: changed}, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize("where", ["tdkit.models.swap.follow_ties", "tdkit.models.checkpoint.reading.attach"])
def test_a_load_that_fails_at_its_end_leaves_the_caller_s_model(
    where: str, gpt2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tdkit.save(tdkit.compress(make_gpt2(), half()).double(), tmp_path / "saved")
    modules, ties = dict(gpt2.named_modules()), dict(gpt2.all_tied_weights_keys)
    before = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    monkeypatch.setattr(where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        tdkit.load(folder, model=gpt2)
    assert dict(gpt2.named_modules()) == modules
    assert gpt2.all_tied_weights_keys == ties
    for name, tensor in gpt2.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [10**12, 10**12]},
        {"shape": [10**6, 10**6]},
        {"shape": [2] * 40},
        {"decomposition": {"low_rank": {"rank": 10**6}}},
        {"decomposition": {"kronecker": {"terms": 10**6}}},
        {"decomposition": {"tt_matrix": {"ranks": 10**6, "cores": 10**6}}},
        {"decomposition": {"tucker": {"ranks": [10**6, 10**6]}}},
        {"decomposition": {"cp": {"rank": 10**12}}},
        {"decomposition": {"blocks": {"of": "low_rank", "rows": 10**6}}},
    ],
    ids=str,
)
def test_sizes_are_refused_before_anything_is_built(entry: dict[str, Any], saved: Path, tied: Any) -> None:
    path = saved / DESCRIPTION
    description = json.loads(path.read_text())
    description["layers"][0] |= entry
    path.write_text(json.dumps(description))
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="layer"):
        tdkit.load(saved, model=fresh(tied))
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
