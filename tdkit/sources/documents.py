"""Texts with where they come from, and datasets of the hub as texts."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from tdkit.errors import MissingDependencyError, SourceError
from tdkit.models import huggingface

COMMIT = re.compile(r"@([0-9a-f]{40})/")  # in the addresses of files of a hub dataset


@dataclass(frozen=True)
class Text:
    """Documents and their origin.

    Attributes:
        name: as it was given.
        documents: one string each.
        dataset: the name of the dataset on the hub or of the registered text; None for files.
        config: the configuration of the dataset, if any.
        split: the split of the dataset, if any.
        revision: the commit of the dataset on the hub; None where it is not known, as for files.
    """

    name: str
    documents: list[str]
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None


def sha256(documents: list[str]) -> str:
    """Returns the SHA-256 of documents joined by blank lines, in UTF-8."""
    digest = hashlib.sha256()
    for number, document in enumerate(documents):
        digest.update(b"\n\n" if number else b"")
        digest.update(document.encode())
    return digest.hexdigest()


def load_dataset(name: str, config: str | None, split: str, remedy: str) -> tuple[list[str], str | None]:
    """Returns the column ``text`` of a dataset of the hub, and its commit if it is known.

    Raises:
        MissingDependencyError: when datasets is not installed.
        SourceError: when the dataset cannot be loaded, or has no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(f"'{name}' is read by datasets: {huggingface.INSTALL}. {remedy}") from error
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        place = ", ".join([*([] if config is None else [config]), split])
        raise SourceError(f"datasets gave no '{name}' ({place}): {reason}. {remedy}") from None
    if "text" not in data.column_names:
        raise SourceError(f"dataset '{name}' has no 'text' column; it has {', '.join(data.column_names)}")
    return list(data["text"]), commit(data.info)


def commit(info: Any) -> str | None:
    """Returns the commit in the addresses that a dataset was downloaded from, or None if there is no single one."""
    found = {match[1] for address in info.download_checksums or {} if (match := COMMIT.search(address))}
    return found.pop() if len(found) == 1 else None
