"""Training rows: packed once, the same for the same seed, held-out ones never trained on."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_models import ids
from tdkit.errors import SourceError
from torch.utils.data import TensorDataset

from tdkit_distill.data.examples import Table, Windows, as_examples, labels_of
from tdkit_distill.data.masked import MaskedWindows, MaskTokens
from tdkit_distill.data.order import Order
from tdkit_distill.data.text import text_windows
from tdkit_distill.errors import DataError, StorageError

TEXT = "\n\n".join(f"Paragraph {k} tells of {k * k} ships, and of the sea." for k in range(900))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<end>", "<mask>", "<cls>", "<sep>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", mask_token="<mask>", cls_token="<cls>", sep_token="<sep>"
    )


def test_packing_loses_nothing_but_the_tail(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    packed = text_windows(file, tokenizer, length=32, cache=tmp_path / "cache")
    joined = packed.train.take(torch.arange(len(packed.train))).flatten().tolist()  # type: ignore[attr-defined]
    assert TEXT.startswith(tokenizer.decode(joined)[:-8])
    assert len(TEXT) - len(tokenizer.decode(joined)) < 200


def test_the_second_time_is_read_from_the_cache(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    first = text_windows(file, tokenizer, length=32, cache=tmp_path / "cache")
    monkeypatch.setattr("tdkit_distill.data.text._pack", lambda *_: pytest.fail("packed again"))
    again = text_windows(file, tokenizer, length=32, cache=tmp_path / "cache")
    assert torch.equal(first.train.ids, again.train.ids)  # type: ignore[attr-defined]
    assert first.train.fingerprint == again.train.fingerprint
    (packed,) = (tmp_path / "cache").glob("*/windows.i32")
    whole = packed.read_bytes()
    packed.write_bytes(b"\xff" + whole[1:])
    with pytest.raises(DataError, match=r"windows\.i32 is damaged: delete"):
        text_windows(file, tokenizer, length=32, cache=tmp_path / "cache")
    packed.write_bytes(whole)
    packed.write_bytes(packed.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"delete .* to pack the text again"):
        text_windows(file, tokenizer, length=32, cache=tmp_path / "cache")


def test_other_text_or_settings_are_packed_apart(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    prints = {text_windows(file, tokenizer, length=n, cache=tmp_path / "c").train.fingerprint for n in (16, 32)}
    file.write_text(TEXT + "x")
    prints.add(text_windows(file, tokenizer, length=32, cache=tmp_path / "c").train.fingerprint)
    assert len(prints) == 3


def test_held_out_windows_are_never_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    whole = text_windows(file, tokenizer, length=16, cache=tmp_path / "c")
    split = text_windows(file, tokenizer, length=16, held_out=10, cache=tmp_path / "c")
    rows = {tuple(r) for r in split.train.take(torch.arange(len(split.train))).tolist()}  # type: ignore[attr-defined]
    aside = {tuple(r) for r in split.held_out.tolist()}
    assert len(split.held_out) == 10
    assert not rows & aside
    assert len(split.train) + 10 == len(whole.train)
    with pytest.raises(DataError, match="leave none to train on"):
        text_windows(file, tokenizer, length=16, held_out=10**6, cache=tmp_path / "c")


def test_files_of_every_kind_give_the_same_windows(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    documents = TEXT.split("\n\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    datasets.Dataset.from_dict({"text": documents}).to_parquet(tmp_path / "a.parquet")
    sets = [
        text_windows(tmp_path / name, tokenizer, length=32, streaming=streaming, cache=tmp_path / "c").train
        for name in ("a.jsonl", "a.parquet")
        for streaming in (True, False)
    ]
    assert all(torch.equal(sets[0].ids, other.ids) for other in sets[1:])  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="has no column 'body'; it has text"):
        text_windows(tmp_path / "a.jsonl", tokenizer, length=32, column="body", cache=tmp_path / "c")


def test_a_share_by_seed_and_a_limit(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in TEXT.split("\n\n")))

    def tokens(**options: Any) -> int:
        return text_windows(tmp_path / "a.jsonl", tokenizer, length=8, cache=tmp_path / "c", **options).tokens

    assert tokens(share=0.2) == pytest.approx(0.2 * tokens(), rel=0.2)
    assert tokens(limit=800) == 800
    prints = {
        text_windows(tmp_path / "a.jsonl", tokenizer, length=8, share=0.2, seed=s, cache=tmp_path / "c").tokens
        for s in range(3)
    }
    assert len(prints) > 1
    with pytest.raises(DataError, match="do not fill one window of 4000"):
        text_windows(tmp_path / "a.jsonl", tokenizer, length=4000, share=0.01, cache=tmp_path / "c")


def test_a_name_that_is_nowhere(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no text 'Skylion007/openwebtext'.*data.train=PATH"):
        text_windows("Skylion007/openwebtext", tokenizer, length=8, cache=tmp_path)
    with pytest.raises(DataError, match="no tokenizer"):
        text_windows("x.txt", None, length=8, cache=tmp_path)


def test_a_full_disk_leaves_no_half_cache(tokenizer: Any, tmp_path: Path) -> None:
    import resource
    import signal

    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageError, match="could not be written to"):
            text_windows(file, tokenizer, length=32, cache=tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [place for place in (tmp_path / "c").iterdir() if place.is_dir()]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of files")
def test_a_file_that_ends_where_the_disk_is_full_is_told(tokenizer: Any, tmp_path: Path) -> None:
    """The last bytes are written when the file is closed."""
    (tmp_path / "a.txt").write_text("a b c d " * 200)
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match="could not be written"):
            text_windows(tmp_path / "a.txt", tokenizer, length=8, cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(text_windows(tmp_path / "a.txt", tokenizer, length=8, cache=tmp_path / "cache").train) > 0


def test_labels_are_the_next_tokens() -> None:
    batch = Windows(ids(4)).batch(torch.tensor([2]), torch.Generator())
    assert torch.equal(batch["labels"][0, :-1], ids(4)[2, 1:])
    assert batch["labels"][0, -1] == -100


def test_masking_hides_the_share_it_says() -> None:
    tokens = MaskTokens(mask=1, start=2, end=3, vocabulary=48)
    examples = MaskedWindows(ids(400, 50) % 40 + 8, tokens)
    batch = examples.batch(torch.arange(400), torch.Generator().manual_seed(0))
    labelled = batch["labels"] != -100
    assert labelled.float().mean() == pytest.approx(0.15 * 50 / 52, rel=0.05)
    assert (batch["input_ids"][labelled] == 1).float().mean() == pytest.approx(0.8, abs=0.02)
    original = examples._windows.ids
    inner = batch["input_ids"][:, 1:-1]
    assert torch.equal(inner[~labelled[:, 1:-1]], original[~labelled[:, 1:-1]])
    assert torch.equal(batch["labels"][labelled], original[labelled[:, 1:-1]])
    again = examples.batch(torch.arange(400), torch.Generator().manual_seed(0))
    assert torch.equal(batch["input_ids"], again["input_ids"])


def test_an_order_visits_each_row_once_per_epoch_and_can_be_entered_anywhere() -> None:
    order = Order(50, share=0.4, seed=1)
    rows = order.take(0, 60)
    assert all(len(set(rows[k : k + 20].tolist())) == 20 for k in (0, 20, 40))
    assert len(set(rows.tolist())) == 20
    assert not torch.equal(rows[:20], rows[20:40])
    assert torch.equal(Order(50, share=0.4, seed=1).take(33, 10), rows[33:43])
    assert not torch.equal(Order(50, share=0.4, seed=2).take(0, 60), rows)


def test_tables_need_equal_columns() -> None:
    with pytest.raises(DataError, match="same, positive number of rows"):
        Table({"a": torch.zeros(3), "b": torch.zeros(4)})


def test_tensors_and_tensor_datasets_become_rows() -> None:
    x, y, rows = torch.randn(6, 4), torch.arange(6) % 2, torch.tensor([4, 1])
    one, two = torch.nn.Linear(4, 2), torch.nn.Bilinear(4, 4, 2)
    for data, model, names in (
        (x, one, ["0"]),
        (TensorDataset(x), one, ["0"]),
        (TensorDataset(x, y), one, ["0", "labels"]),
        (TensorDataset(x, x), two, ["0", "1"]),
        (TensorDataset(x, x, y), two, ["0", "1", "labels"]),
        ({"x": x, "target": y}, one, ["x", "target"]),
    ):
        examples = as_examples(data, model)
        batch = examples.batch(rows, torch.Generator())
        assert list(batch) == names
        assert torch.equal(batch[names[0]], x[rows])
        assert (len(examples), examples.length) == (6, 1)
        assert labels_of(batch) is None or torch.equal(batch[names[-1]], y[rows])
    windows = as_examples(TensorDataset(ids(6, 8)), one)
    assert isinstance(windows, Windows)
    assert windows.length == Table({"labels": y, "input_ids": ids(6, 8)}).length == 8
    with pytest.raises(
        DataError, match=r"data is a list: give a tensor, a TensorDataset, named columns \{name: tensor\}"
    ):
        as_examples([x, y], one)
    with pytest.raises(DataError, match="data is a TensorDataset, and a batch has 2 entries, which"):
        as_examples(TensorDataset(x, y), torch.nn.MultiheadAttention(4, 1))  # which takes three
