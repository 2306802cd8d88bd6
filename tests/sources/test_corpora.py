"""WikiText and LAMBADA from copies on disk in their published layouts; without a copy and a network, a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tdkit.errors import SourceError
from tdkit.sources.corpora import Corpus, lambada, wikitext_2, wikitext_2_raw, wikitext_103
from tdkit.sources.documents import commit, sha256
from tdkit.sources.texts import load_texts, read_text

LINES = [" \n", " = A Title = \n", " \n", " Some <unk> text , with\u2028a separator . \n"]
ROWS = ["", " = A Title = \n", "", " Some <unk> text , with\u2028a separator . \n"]  # as the dataset has them


@pytest.mark.parametrize("corpus", [wikitext_2, wikitext_103, wikitext_2_raw])
def test_a_file_of_the_release_gives_the_rows_of_the_dataset(corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "wikitext"
    folder.mkdir()
    (folder / corpus.file).write_text("".join(LINES), encoding="utf-8")
    expected = ["\n\n".join(ROWS)]
    assert load_texts(f"{corpus.name}:{tmp_path}") == expected  # anywhere below the folder
    assert load_texts(f"{corpus.name}:{folder / corpus.file}") == expected


def parquet(path: Path, rows: list[str]) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as format_

    path.parent.mkdir(parents=True, exist_ok=True)
    format_.write_table(arrow.table({"text": rows}), path)


def test_files_of_the_dataset_are_read_in_order(tmp_path: Path) -> None:
    parquet(tmp_path / "wikitext-2-v1" / "test-00001-of-00002.parquet", ROWS[2:])
    parquet(tmp_path / "wikitext-2-v1" / "test-00000-of-00002.parquet", ROWS[:2])
    parquet(tmp_path / "wikitext-2-v1" / "train-00000-of-00001.parquet", ["no"])
    parquet(tmp_path / "wikitext-103-v1" / "test-00000-of-00001.parquet", ["another"])
    text = read_text(f"wikitext-2:{tmp_path}")
    assert text.documents == ["\n\n".join(ROWS)]
    assert (text.dataset, text.config, text.split) == ("Salesforce/wikitext", "wikitext-2-v1", "test")
    assert load_texts(f"wikitext-2:{tmp_path / 'wikitext-2-v1'}") == text.documents
    assert load_texts(f"wikitext-103:{tmp_path}") == ["another"]
    with pytest.raises(SourceError, match="holds none of its files"):  # never those of another configuration
        load_texts(f"wikitext-2-raw:{tmp_path}")


def test_passages_of_lambada_are_joined_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / lambada.file).write_text("one passage \nanother passage\n", encoding="utf-8")
    assert load_texts(f"lambada:{tmp_path}") == ["one passage\n\nanother passage"]


def test_without_a_copy_the_remedy_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"Salesforce/wikitext.*Offline, give a copy as wikitext-2:PATH.*wiki.test"):
        load_texts("wikitext-2")
    with pytest.raises(SourceError, match=r"no text 'lambada:.*does not exist\. Offline, give a copy as lambada:PATH"):
        load_texts(f"lambada:{tmp_path / 'nothing'}")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(SourceError, match=r"broken.parquet has no column 'text' that can be read"):
        load_texts(f"lambada:{tmp_path / 'broken.parquet'}")


def test_the_commit_is_read_from_the_addresses_of_a_download() -> None:
    datasets = pytest.importorskip("datasets")
    first, second = "0123456789abcdef0123456789abcdef01234567", "f" * 40

    def info(*commits: str) -> Any:
        return datasets.DatasetInfo(
            download_checksums={f"hf://datasets/Salesforce/wikitext@{each}/x.parquet": {} for each in commits}
        )

    assert commit(info(first)) == first
    assert commit(info(first, second)) is None
    assert commit(datasets.DatasetInfo()) is None


def test_the_digest_is_of_the_joined_documents() -> None:
    import hashlib

    assert sha256(["a", "é"]) == hashlib.sha256("a\n\né".encode()).hexdigest()
