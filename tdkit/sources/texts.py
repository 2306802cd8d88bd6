"""Load texts by name and encode them as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdkit.errors import MissingDependencyError, SourceError, did_you_mean
from tdkit.models import huggingface
from tdkit.registry import Registry
from tdkit.sources.source import TextSource, call_source, not_callable

text_sources: Registry[TextSource] = Registry(
    "tdkit.texts", "text source", {"sotu": "tdkit.sources.sotu:load_sotu"}, not_callable
)

LONGEST_WORD = 100  # characters; a longer text without spaces, such as Chinese, is cut anywhere


def load_texts(name: str | Path | Sequence[str | Path]) -> list[str]:
    """Load documents, one string each, from a text file, a folder, a registered text, a dataset, or several of these.

    A local path takes precedence over a registered name (entry points ``tdkit.texts``), and that over the hub.

    Args:
        name: a UTF-8 text file; a folder, whose ``.txt`` files are read; ``NAME`` or ``NAME:PART`` of a registered
            text, such as ``sotu:calibration`` (State of the Union speeches before 2015) and ``sotu:evaluation`` (the
            last six); or ``DATASET[@CONFIG][:SPLIT]``, whose ``text`` column is read.

    Raises:
        SourceError: when there is no such text, it cannot be read, or its source fails.
        RegistryError: when two packages provide the name, or its source fails to import.
    """
    if not isinstance(name, str | Path):
        return [text for one in name for text in load_texts(one)]
    path = Path(name)
    if path.is_file():
        return [_read(path)]
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise SourceError(f"{path} holds no .txt files")
        return [_read(file) for file in files]
    if str(name).partition(":")[0] in text_sources.names():
        return _registered(str(name))
    return _dataset(str(name))


def _registered(name: str) -> list[str]:
    def load(source: TextSource, part: str | None) -> object:
        return source(part)

    found = call_source(text_sources, name, load, list)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise SourceError(f"text '{name}': document {number} is a {type(text).__name__}, not a string")
    return found


def _dataset(name: str) -> list[str]:
    path, _, split = name.partition(":")
    path, _, config = path.partition("@")
    known = ", ".join(text_sources.names())
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"'{name}' is no file or folder here and none of the registered texts ({known}); to "
            f"read it as a dataset: {huggingface.INSTALL}"
        ) from error
    try:
        data = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"no text '{name}'{did_you_mean(name.partition(':')[0], text_sources.names()) or '.'} It is no file or "
            f"folder here, none of the registered texts ({known}), and datasets found none ({reason}). "
            "Offline, give a .txt file or a folder of them"
        ) from None
    if "text" not in data.column_names:
        raise SourceError(f"dataset '{name}' has no 'text' column; it has {', '.join(data.column_names)}")
    return list(data["text"])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as UTF-8 text: {error}") from None


def encode(texts: Sequence[str], tokenizer: Any, limit: int | None = None) -> Tensor:
    """Returns the token ids (n,), int64, of all texts joined by blank lines, at most `limit` of them.

    Raises:
        SourceError: when there is no tokenizer, or no token.
    """
    pieces = _ids(texts, tokenizer, limit)
    if not pieces:
        raise SourceError("the text is empty")
    return torch.tensor(pieces, dtype=torch.long)


def _ids(texts: Sequence[str], tokenizer: Any, limit: int | None) -> list[int]:
    if tokenizer is None:
        raise SourceError("this model has no tokenizer: give a folder that holds one")
    pieces: list[int] = []
    for number, text in enumerate(texts):
        ids = tokenizer(("\n\n" if number else "") + text, add_special_tokens=False, verbose=False)["input_ids"]
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
