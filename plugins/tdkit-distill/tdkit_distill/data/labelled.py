"""Labelled texts as rows for a classifier: one tokenised text and its class per row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tdkit.errors import SourceError

from tdkit_distill.data.examples import Table
from tdkit_distill.data.order import mixed_seed
from tdkit_distill.errors import DataError


def read_labelled(
    source: str | Sequence[str], *, column: str = "text", labels: str = "label"
) -> tuple[list[str], list[Any]]:
    """Texts and their labels, of one source or of several in order.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file, a folder with one subfolder of ``.txt`` files per class, a
            ``datasets`` name ``DATASET[@CONFIG][:SPLIT]``, or a list of these.
        column: name of the column that holds the text; folders have none.
        labels: name of the column that holds the label; folders have none.

    Raises:
        SourceError, DataError: when there is no such source or it lacks a column.
    """
    if not isinstance(source, str):
        every = [read_labelled(one, column=column, labels=labels) for one in source]
        return [text for texts, _ in every for text in texts], [label for _, found in every for label in found]
    path = Path(source)
    if path.is_dir():
        found = [(f.read_text(encoding="utf-8", errors="replace"), f.parent.name) for f in sorted(path.glob("*/*.txt"))]
        if not found:
            raise SourceError(f"{path} holds no CLASS/*.txt files")
        return [text for text, _ in found], [label for _, label in found]
    import datasets  # slow to import, and only such sources need it

    name, _, split = source.partition(":")
    name, _, config = name.partition("@")
    try:
        if path.is_file():
            builder = "parquet" if path.suffix == ".parquet" else "json"
            data = datasets.load_dataset(builder, data_files=source, split="train")
        else:
            data = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"no labelled text '{source}': it is no file or folder here, and datasets gave none ({reason}). Offline, "
            "give a .jsonl or .parquet file, or a folder with a subfolder per class: data.train=PATH"
        ) from None
    for wanted in (column, labels):
        if wanted not in data.column_names:
            raise DataError(f"'{source}' has no column '{wanted}'; it has {', '.join(data.column_names)}")
    return list(data[column]), list(data[labels])


def labelled_rows(texts: Sequence[str], labels: Sequence[Any], tokenizer: Any, *, length: int) -> Table:
    """Rows of ``input_ids``, ``attention_mask`` and ``labels``, padded and cut to `length` tokens.

    Integer labels are kept; others are numbered in sorted order over all rows.

    Raises:
        DataError: without a tokenizer, or when only some of the labels are integers.
    """
    if tokenizer is None:
        raise DataError("this model has no tokenizer: give a folder that holds one, model=PATH")
    names = sorted(set(labels), key=str)
    integers = [name for name in names if isinstance(name, int)]
    if integers and len(integers) < len(names):
        other = next(name for name in names if not isinstance(name, int))
        raise DataError(
            f"some labels are integers ({integers[0]!r}) and some are not ({other!r}), so that their numbers could "
            "coincide: write all of them in one way"
        )
    numbers = {name: int(name) if integers else number for number, name in enumerate(names)}
    encoded = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt", verbose=False
    )
    columns = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
    return Table({**columns, "labels": torch.tensor([numbers[label] for label in labels])})


def divide(table: Table, held_out: int, seed: int) -> tuple[Table, Table]:
    """Training rows and `held_out` rows put aside, chosen by the seed."""
    if not 0 < held_out < len(table):
        raise DataError(f"{held_out} of {len(table)} rows cannot be held out: leave some on both sides")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(mixed_seed(seed, "held out")))
    aside, rest = order[:held_out].sort().values, order[held_out:].sort().values
    parts = [Table({name: column[rows] for name, column in table.columns.items()}) for rows in (rest, aside)]
    return parts[0], parts[1]
