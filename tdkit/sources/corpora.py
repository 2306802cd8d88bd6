"""WikiText and LAMBADA as the papers on language models read them: from the hub, or from a copy on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdkit.errors import MissingDependencyError, SourceError
from tdkit.models import huggingface
from tdkit.sources.documents import Text, load_dataset


@dataclass(frozen=True)
class Corpus:
    """The test split of a dataset, whose rows, joined by blank lines, are one document.

    Attributes:
        name: the registered name.
        dataset: the name on the hub.
        config: the configuration of the dataset.
        file: the file of the original release, one row per line.
        row: a function that returns a line of that file as the dataset has it.
    """

    name: str
    dataset: str
    config: str
    file: str
    row: Callable[[str], str]
    split: str = "test"

    def __call__(self, part: str | None) -> list[str]:
        return self.read(part).documents

    def read(self, part: str | None) -> Text:
        """Read the split from the hub, or from `part`, the path of a file or folder.

        A file has one row per line, as in the original release, or is a Parquet file with a column ``text``. A folder
        holds one of these: the file of the release, or those of the dataset, ``CONFIG/test-*.parquet``.

        Raises:
            SourceError: when there is no such file, or the hub gives none.
            MissingDependencyError: when a package is needed that is not installed.
        """
        if part is None:
            rows, revision = load_dataset(self.dataset, self.config, self.split, self._remedy())
        else:
            rows, revision = self._local(Path(part)), None
        name = self.name if part is None else f"{self.name}:{part}"
        joined = "\n\n".join(rows)
        return Text(name, [joined], self.dataset, self.config, self.split, revision)

    def _local(self, path: Path) -> list[str]:
        if path.is_file():
            files = [path]
        else:
            files = sorted(path.rglob(self.file))[:1] if path.is_dir() else []
            files = files or self._shards(path)
        if not files:
            what = "holds none of its files" if path.is_dir() else "does not exist"
            raise SourceError(f"no text '{self.name}:{path}': {path} {what}. {self._remedy()}")
        return [row for file in files for row in self._rows(file)]

    def _shards(self, path: Path) -> list[Path]:
        shards = sorted(path.rglob(f"{self.split}-*.parquet"))
        own = [file for file in shards if file.parent.name == self.config]
        return own or ([] if any(file.parent != path for file in shards) else shards)

    def _rows(self, file: Path) -> list[str]:
        if file.suffix == ".parquet":
            return _parquet(file)
        try:
            with file.open(encoding="utf-8", newline="\n") as lines:  # other line separators are part of the text
                return [self.row(line) for line in lines]
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{file} cannot be read as UTF-8 text: {error}") from None

    def _remedy(self) -> str:
        return (
            f"Offline, give a copy as {self.name}:PATH, a folder with {self.file} or "
            f"{self.config}/{self.split}-*.parquet in it, or one of these files"
        )


def _parquet(file: Path) -> list[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(f"{file} needs pyarrow, which datasets brings: {huggingface.INSTALL}") from error
    try:
        rows: Sequence[str] = parquet.read_table(file, columns=["text"])["text"].to_pylist()
    except Exception as error:
        raise SourceError(f"{file} has no column 'text' that can be read: {error}") from None
    return list(rows)


def _wikitext_row(line: str) -> str:
    return line if line.strip() else ""


WIKITEXT = "Salesforce/wikitext"

wikitext_2 = Corpus("wikitext-2", WIKITEXT, "wikitext-2-v1", "wiki.test.tokens", _wikitext_row)
wikitext_103 = Corpus("wikitext-103", WIKITEXT, "wikitext-103-v1", "wiki.test.tokens", _wikitext_row)
wikitext_2_raw = Corpus("wikitext-2-raw", WIKITEXT, "wikitext-2-raw-v1", "wiki.test.raw", _wikitext_row)
lambada = Corpus("lambada", "cimec/lambada", "plain_text", "lambada_test_plain_text.txt", str.strip)
