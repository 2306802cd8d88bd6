"""Labelled rows: every source is read, in order, and labels are numbered over all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tdkit.errors import SourceError

from tdkit_distill.data.labelled import labelled_rows, read_labelled
from tdkit_distill.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<unk>", *"abcdef"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def write(path: Path, rows: list[tuple[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return str(path)


def test_several_files_are_read_in_order_and_numbered_together(tokenizer: Any, tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", [("a b", "sad"), ("c", "glad")])
    second = write(tmp_path / "second.jsonl", [("d", "angry"), ("e f", "sad")])
    texts, labels = read_labelled([first, second])
    assert texts == ["a b", "c", "d", "e f"]
    table = labelled_rows(texts, labels, tokenizer, length=4)
    assert table.columns["labels"].tolist() == [2, 1, 0, 2], "angry, glad, sad"
    assert table.columns["attention_mask"].sum(1).tolist() == [2, 1, 1, 2]


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("good/1.txt", "bad/1.txt", "bad/2.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_labelled(str(tmp_path)) == (["bad/1.txt", "bad/2.txt", "good/1.txt"], ["bad", "bad", "good"])


def test_integer_labels_are_kept_and_mixed_ones_refused(tokenizer: Any) -> None:
    assert labelled_rows(["a", "b"], [3, 0], tokenizer, length=2).columns["labels"].tolist() == [3, 0]
    with pytest.raises(DataError, match=r"some labels are integers \(1\) and some are not \('no'\)"):
        labelled_rows(["a", "b"], [1, "no"], tokenizer, length=2)


def test_what_is_not_there(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [("a", 0)])
    with pytest.raises(DataError, match="has no column 'sentence'; it has text, label"):
        read_labelled([file, file], column="sentence")
    with pytest.raises(SourceError, match=r"no labelled text 'nowhere.jsonl'.*data.train=PATH"):
        read_labelled([file, "nowhere.jsonl"])
    with pytest.raises(DataError, match="no tokenizer"):
        labelled_rows(["a"], [0], None, length=2)
