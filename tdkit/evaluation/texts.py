"""Measure a language model on texts by name, by the protocol of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tdkit.errors import OptionError
from tdkit.evaluation.batches import agreement_figures
from tdkit.evaluation.language_models import Evaluation, check_takes_text, evaluate
from tdkit.evaluation.protocols import Protocol, named
from tdkit.evaluation.reports import DatasetIdentity, Figure, ProtocolReport, Result, tokens_sha256
from tdkit.sources.documents import Text, sha256
from tdkit.sources.source import Source
from tdkit.sources.texts import encode, read_text, windows

TOKENS = 16384  # of a text without a protocol of its own


def read_texts(names: str | Path | Sequence[str | Path]) -> Text:
    """Returns one text, or several joined to one.

    Raises:
        OptionError: when a text with a protocol of its own is joined with others.
        SourceError, RegistryError, MissingDependencyError: as `load_texts`.
    """
    listed = [names] if isinstance(names, str | Path) else list(names)
    if len(listed) == 1:
        return read_text(listed[0])
    own = next((str(name) for name in listed if named(str(name)) is not None), None)
    if own is not None:
        raise OptionError(f"'{own}' has a protocol of its own: measure it in a call without other texts")
    documents = [document for name in listed for document in read_text(name).documents]
    return Text(" + ".join(map(str, listed)), documents)


def protocol_of(text: Text, context: int | None = None) -> Protocol:
    """Returns the protocol of a text by name, or the default one; a context replaces that of a protocol."""
    own = named(text.name) or Protocol()
    if context is None or context == own.context:
        return own
    return Protocol(
        context=context, stride=own.stride, partial=own.partial, mean=own.mean, special_tokens=own.special_tokens
    )


def limit_of(text: Text, tokens: int | None) -> int | None:
    """Returns how many tokens of a text are used: all where it has a protocol of its own."""
    return TOKENS if tokens is None and named(text.name) is None else tokens


def measure_text(
    source: Source,
    text: Text,
    *,
    tokens: int | None = None,
    context: int | None = None,
    batch: int = 1,
    progress: bool | None = None,
) -> tuple[Result, Evaluation]:
    """Measure the perplexity of a model on a text that `read_texts` returned.

    Args:
        source: the model and its tokenizer.
        text: with a protocol of its own if its name has one, see docs/evaluation.md.
        tokens: use at most so many tokens of the text; when None, all of a text with a protocol of its own and
            `TOKENS` of others.
        context: tokens per window, instead of those of the protocol; the protocol is then no longer the named one.
        batch: windows per forward pass.
        progress: show a progress bar; when None, only on a terminal.

    Returns:
        The result for a report, and the evaluation.

    Raises:
        EvaluationError, SourceError: as `evaluate` and `encode`.
    """
    check_takes_text(source.model)
    protocol = protocol_of(text, context)
    limit = limit_of(text, tokens)
    ids = encode(text.documents, source.tokenizer, limit, special_tokens=protocol.special_tokens)
    measured = evaluate(source.model, ids, batch=batch, protocol=protocol, progress=progress)
    own = named(text.name)
    return Result(
        task=text.name,
        dataset=DatasetIdentity(
            name=text.dataset or text.name,
            config=text.config,
            split=text.split,
            revision=text.revision,
            sha256=sha256(text.documents),
        ),
        protocol=ProtocolReport(
            name=text.name.partition(":")[0] if own == protocol else "windows",
            description=protocol.describe() + ("" if limit is None else f"; at most the first {limit:,} tokens"),
            context=protocol.context,
            stride=protocol.stride or protocol.context,
            windows=measured.windows,
        ),
        tokens=measured.tokens,
        tokens_sha256=tokens_sha256([ids]),
        figures={"perplexity": Figure(value=measured.perplexity, stderr=measured.stderr)},
    ), measured


def compare_text(
    result: Result,
    source: Source,
    dense: Source,
    text: Text,
    *,
    known: tuple[Result, Evaluation] | None = None,
    tokens: int | None = None,
    context: int | None = None,
    batch: int = 1,
    progress: bool | None = None,
) -> tuple[Result, Evaluation]:
    """Add to a result of `measure_text` how the model compares with the dense one on the same text.

    Args:
        result: of `source` on `text`, measured with the same `tokens`, `context` and `batch`.
        dense: the model before; it is given the token ids of the tokenizer of `source`.
        known: what this returned for another `source`, on the same text with the same options: where the token ids are
            the same, the dense model is not measured again.

    Returns:
        The result with "dense perplexity" and the figures of `agreement_figures`, on non-overlapping windows; and the
        evaluation of the dense model.
    """
    if known is not None and known[0].tokens_sha256 == result.tokens_sha256:
        figure, measured = known[0].figures["dense perplexity"], known[1]
    else:
        same = replace(dense, tokenizer=source.tokenizer)
        of_dense, measured = measure_text(same, text, tokens=tokens, context=context, batch=batch, progress=progress)
        figure = of_dense.figures["perplexity"]
    protocol = protocol_of(text, context)
    ids = encode(text.documents, source.tokenizer, limit_of(text, tokens), special_tokens=protocol.special_tokens)
    rows = torch.split(windows(ids, min(protocol.context, len(ids))), batch)
    figures = {
        **result.figures,
        "dense perplexity": figure,
        **agreement_figures(source.model, dense.model, rows, progress=progress),
    }
    return result.model_copy(update={"figures": figures}), measured
