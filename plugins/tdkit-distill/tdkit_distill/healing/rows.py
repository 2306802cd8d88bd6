"""What a model is healed on and measured on: training rows, held-out rows of the same data, and other texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from tdkit.errors import MissingDependencyError, SourceError
from tdkit.sources.positions import check_positions
from tdkit.sources.texts import spread_windows
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tdkit_distill.data.examples import Batch, Examples, Windows, as_examples, digest
from tdkit_distill.data.order import mixed_seed
from tdkit_distill.data.text import text_windows
from tdkit_distill.errors import DataError

Text = str | Path | Sequence[str]
Data = Text | Examples | Tensor | TensorDataset | Mapping[str, Tensor]

OTHERS = ("python:reference", "python:source")  # there on every machine, and of other kinds than most texts
HELD_OUT_TOKENS = 4096
OTHER_TOKENS = 2048
HELD_OUT_SHARE = 0.1  # of the rows, at most


class Part(Examples):
    """Some rows of other examples."""

    def __init__(self, whole: Examples, rows: Tensor) -> None:
        self.whole = whole
        self.rows = rows
        self.fixed = whole.fixed
        self.fingerprint = hashlib.sha256(f"{whole.fingerprint}{digest(rows)}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def length(self) -> int:
        return self.whole.length

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        return self.whole.batch(self.rows[rows], generator)


@dataclass(frozen=True)
class Rows:
    """Rows to train on, and those that are only measured.

    Attributes:
        train: no more than are trained on.
        held_out: by name; the first ones are of the same data, the others of other kinds of text.
        not_measured: why other texts are missing.
        to_generate: rows to train on that the teacher is still to generate.
    """

    train: Examples
    held_out: dict[str, Examples]
    not_measured: tuple[str, ...] = ()
    to_generate: int = 0


def rows_of(
    data: Data,
    model: nn.Module,
    tokenizer: Any,
    *,
    tokens: int,
    generated: int = 0,
    context: int,
    held_out: Data | None,
    others: Sequence[str] | Mapping[str, Data] | None,
    seed: int,
) -> Rows:
    """Read the data and put rows aside.

    Args:
        tokens: to train on, of which the teacher generates `generated`.
        data: a text by name or path, which is packed into windows of `context` tokens, or what `distill` takes.
        held_out: other rows to measure on; None puts at most a tenth of the rows aside, chosen by the seed.
        others: texts of other kinds; None takes `OTHERS`, as far as they are there and the model takes text.

    Raises:
        DataError: for data without enough rows, for a text without a tokenizer, and for data that are not token ids
            where others are generated.
        SourceError: when there is no such text.
    """
    whole = _examples(data, model, tokenizer, context, seed)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(mixed_seed(seed, "held out")))
    aside = 0
    if held_out is None:
        aside = min(-(-HELD_OUT_TOKENS // whole.length), max(1, round(HELD_OUT_SHARE * len(whole))))
        if aside >= len(whole):
            raise DataError(f"{len(whole)} rows leave none to measure on: give more data, or other rows as held_out=")
    own = generated // whole.length
    if generated:
        entries = whole.batch(torch.tensor([0]), torch.Generator()).keys()
        if not whole.fixed or entries != {"input_ids", "labels"}:
            raise DataError("self_generated= goes with a text or with rows of token ids, and the data are others")
        if not own:
            raise DataError(f"self_generated={generated}: give at least one window of {whole.length} tokens")
    needed = -(-tokens // whole.length) - own
    train = Part(whole, order[aside : aside + needed].sort().values)
    name = "held out" if held_out is None else _name(held_out)
    sets = {
        name: Part(whole, order[:aside].sort().values)
        if held_out is None
        else _aside(held_out, model, tokenizer, context, HELD_OUT_TOKENS)
    }
    missing = []
    for other, text in _others(others, data, tokenizer).items():
        try:
            sets[other] = _aside(text, model, tokenizer, context, OTHER_TOKENS)
        except (SourceError, MissingDependencyError) as error:
            if others is not None:
                raise
            missing.append(f"{other} is not measured: {error}")
    if others is None and len(sets) == 1:
        missing.append(
            "no text of another kind is measured: pass others= to see whether they get worse"
            if not missing
            else "so no text of another kind is measured"
        )
    return Rows(train, sets, tuple(missing), own)


def _examples(data: Data, model: nn.Module, tokenizer: Any, context: int, seed: int) -> Examples:
    if not _is_text(data):
        return as_examples(data, model)
    check_positions(model, context)
    return text_windows(data, tokenizer, length=context, seed=seed).train


def _aside(data: Data, model: nn.Module, tokenizer: Any, context: int, tokens: int) -> Examples:
    """Held-out rows: windows spread over a text, or all rows of anything else."""
    if not _is_text(data):
        return as_examples(data, model)
    check_positions(model, context)
    return Windows(spread_windows(data, tokenizer, context=context, tokens=tokens))


def _others(others: Sequence[str] | Mapping[str, Data] | None, data: Data, tokenizer: Any) -> dict[str, Data]:
    if isinstance(others, Mapping):
        return dict(others)
    if others is None and tokenizer is None:
        return {}
    given: list[str] = []
    if _is_text(data):
        given = [str(data)] if isinstance(data, str | Path) else [str(each) for each in data]
    return {name: name for name in (OTHERS if others is None else others) if name not in given}


def _is_text(data: Any) -> TypeGuard[Text]:
    if isinstance(data, str | Path):
        return True
    return isinstance(data, Sequence) and bool(data) and all(isinstance(each, str | Path) for each in data)


def _name(held_out: Data) -> str:
    return str(held_out) if isinstance(held_out, str | Path) else "held out"
