"""Text to training windows: read, tokenised and packed once, kept in a cache folder, memory-mapped after that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tdkit.errors import SourceError
from tdkit.sources.texts import load_texts, text_sources
from tdkit.support.documents import read_json
from tdkit.support.files import digest_of_file, whole_folder
from torch import Tensor

from tdkit_distill.data.examples import Examples, Windows
from tdkit_distill.data.lock import exclusive
from tdkit_distill.data.masked import MaskedPairs, MaskedWindows, MaskTokens
from tdkit_distill.data.order import mixed_seed
from tdkit_distill.errors import DataError, StorageError

FORMAT = 2
PIECE = 1 << 14  # characters of a text file that are chosen or left out together
TOGETHER = 256  # documents tokenised in one call

Objective = Literal["causal", "masked", "masked_pairs"]
MASKED: dict[str, type[MaskedWindows]] = {"masked": MaskedWindows, "masked_pairs": MaskedPairs}


@dataclass(frozen=True)
class TextWindows:
    """Training windows and the windows that are never trained on.

    Attributes:
        train: examples of the objective asked for.
        held_out: (count, length) token ids; without the tokens that masked rows have around them.
        tokens: of the whole text that was packed.
        masking: what masking needs; None for causal windows.
        objective: of the training windows.
    """

    train: Examples
    held_out: Tensor
    tokens: int
    masking: MaskTokens | None = None
    objective: Objective = "causal"

    def held_out_examples(self) -> Examples:
        """The held-out windows under the same objective."""
        if self.masking is None:
            return Windows(self.held_out)
        return MASKED[self.objective](self.held_out, self.masking)


def text_windows(
    source: str | Path | Sequence[str],
    tokenizer: Any,
    *,
    length: int,
    share: float = 1.0,
    held_out: int = 0,
    limit: int | None = None,
    seed: int = 0,
    objective: Objective = "causal",
    streaming: bool = True,
    column: str = "text",
    cache: str | Path | None = None,
) -> TextWindows:
    """Read a text, tokenise and pack it into windows of `length`, once.

    Documents are joined by the end-of-text token; windows do not overlap and the rest is left out. Of several
    processes that ask for the same windows one packs them and the others wait.

    Args:
        source: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder of them, a registered text, or a ``datasets``
            name ``DATASET[@CONFIG][:SPLIT]``; several of these as a list.
        share: of the documents, chosen by the seed one by one, so that a stream is cut as well. Pieces of
            about 16,000 characters of text files count as documents for this.
        held_out: how many windows are put aside, chosen by the seed; they are never trained on.
        limit: stop after this many tokens.
        objective: ``causal`` windows, ``masked`` ones between start and end tokens, or ``masked_pairs`` of
            segments for next-sentence prediction.
        streaming: read a hub dataset as a stream rather than download it whole.
        column: of the dataset that holds the text.
        cache: folder of packed windows; ``~/.cache/tdkit/windows`` when None.

    Raises:
        DataError: when the text is too short, or has no such column.
        SourceError: when there is no such text.
    """
    if tokenizer is None:
        raise DataError("this model has no tokenizer: give a folder that holds one, model=PATH")
    inner = length - (MASKED[objective].edges if objective in MASKED else 0)
    sources = [str(source)] if isinstance(source, str | Path) else [str(one) for one in source]
    settings = {
        "format": FORMAT,
        "sources": [_identity(one) for one in sources],
        "tokenizer": tokenizer_digest(tokenizer),
        "length": inner,
        "share": share,
        "limit": limit,
        "seed": seed,
        "column": column,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(cache or Path.home() / ".cache" / "tdkit" / "windows") / key
    if not _is_packed(folder):  # a finished cache may lie where nothing can be written
        with exclusive(folder):
            if not _is_packed(folder):  # no other process has packed them meanwhile
                pieces = (piece for one in sources for piece in _pieces(one, column, streaming))
                chosen = (piece for number, piece in enumerate(pieces) if _chosen(seed, number, share))
                _pack(chosen, tokenizer, inner, limit, folder, settings, ", ".join(sources))
    ids = _open(folder, inner)
    return _divide(ids, held_out, seed, key, objective, tokenizer)


def _is_packed(folder: Path) -> bool:
    return (folder / "windows.json").is_file()


def _divide(ids: Tensor, held_out: int, seed: int, key: str, objective: Objective, tokenizer: Any) -> TextWindows:
    if held_out >= len(ids):
        raise DataError(f"{held_out} held-out windows of {len(ids)} leave none to train on: give more text or fewer")
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(mixed_seed(seed, "held out")))
    aside, rest = order[:held_out].sort().values, order[held_out:].sort().values
    kept = ids[aside].long() if held_out else ids[:0].long()
    rows = rest if held_out else None
    fingerprint = f"{key}-{held_out}-{seed}"
    if objective in MASKED:
        tokens = MaskTokens(
            _token(tokenizer, "mask"), _token(tokenizer, "cls"), _token(tokenizer, "sep"), len(tokenizer)
        )
        train = MASKED[objective](ids, tokens, fingerprint=fingerprint, rows=rows)
        return TextWindows(train, kept, ids.numel(), tokens, objective)
    return TextWindows(Windows(ids, fingerprint, rows=rows), kept, ids.numel())


def _token(tokenizer: Any, name: str) -> int:
    token = getattr(tokenizer, f"{name}_token_id", None)
    if token is None:
        raise DataError(f"masked windows need a {name} token, which this tokenizer lacks: use objective: causal")
    return int(token)


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's serialised form, or of its vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(source: str) -> list[Any]:
    """What tells one state of a source from another: name, and size and date of local files."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(_files(path)) if path.is_dir() else []
    return [source, *([str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files)]


def _files(folder: Path) -> Iterator[Path]:
    return (f for f in folder.rglob("*") if f.suffix in (".txt", ".jsonl", ".json", ".parquet"))


def _chosen(seed: int, number: int, share: float) -> bool:
    return share >= 1 or mixed_seed(seed, "document", number) < share * 2**63


def _pieces(source: str, column: str, streaming: bool) -> Iterator[tuple[str, bool]]:
    """Texts in order, each with whether a document ends there."""
    path = Path(source)
    if path.is_dir():
        files = sorted(_files(path))
        if not files:
            raise SourceError(f"{path} holds no .txt, .jsonl or .parquet files")
        for file in files:
            yield from _pieces(str(file), column, streaming)
    elif path.is_file() and path.suffix in (".jsonl", ".json", ".parquet"):
        builder = "parquet" if path.suffix == ".parquet" else "json"
        yield from _rows(builder, None, {"train": str(path)}, "train", column, streaming, source)
    elif path.is_file() or source.partition(":")[0] in text_sources.names():
        for text in load_texts(source):
            yield from _cut(text)
    else:
        name, _, split = source.partition(":")
        name, _, config = name.partition("@")
        yield from _rows(name, config or None, None, split or "train", column, streaming, source)


def _rows(
    name: str, config: str | None, files: Any, split: str, column: str, streaming: bool, source: str
) -> Iterator[tuple[str, bool]]:
    import datasets  # slow to import, and only such sources need it

    try:
        data = datasets.load_dataset(name, config, data_files=files, split=split, streaming=streaming)
        for row in data:
            if column not in row:
                raise DataError(f"'{source}' has no column '{column}'; it has {', '.join(row)}: say column=")
            yield row[column], True
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"no text '{source}': it is no file or folder here, and datasets gave none ({reason}). Offline, give a "
            ".txt, .jsonl or .parquet file or a folder of them: data.train=PATH"
        ) from None


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    while len(text) > PIECE:
        end = text.find("\n\n", PIECE)
        if end < 0:
            break
        yield text[: end + 2], False
        text = text[end + 2 :]
    yield text, True


def _pack(
    pieces: Iterable[tuple[str, bool]],
    tokenizer: Any,
    length: int,
    limit: int | None,
    folder: Path,
    settings: dict[str, Any],
    place: str,
) -> None:
    count, rest = 0, np.zeros(0, dtype=np.int32)
    most = None if limit is None else limit // length
    try:
        with whole_folder(folder) as target:
            with (target / "windows.i32").open("wb") as file:
                for ids in _token_runs(pieces, tokenizer):
                    rest = np.concatenate([rest, ids])
                    whole = len(rest) // length if most is None else min(len(rest) // length, most - count)
                    file.write(rest[: whole * length].tobytes())  # `tofile` does not tell that the disk is full
                    rest = rest[whole * length :]
                    count += whole
                    if most is not None and count >= most:
                        break
            if not count:
                raise DataError(
                    f"'{place}' gives {len(rest)} tokens, which do not fill one window of {length}: give more text, a "
                    "larger share or a shorter length"
                )
            form = {**settings, "count": count, "sha256": digest_of_file(target / "windows.i32")}
            (target / "windows.json").write_text(json.dumps(form, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise StorageError(
            f"the packed windows of '{place}' could not be written to {folder}: {error}. Free some space, or give "
            "another cache folder"
        ) from error


def _token_runs(pieces: Iterable[tuple[str, bool]], tokenizer: Any) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        end = getattr(tokenizer, "sep_token_id", None)
    close = [] if end is None else [end]
    iterator = iter(pieces)
    while batch := list(islice(iterator, TOGETHER)):
        encoded = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        joined: list[int] = []
        for ids, (_, last) in zip(encoded, batch, strict=True):
            joined.extend((*ids, *(close if last else ())))
        yield np.asarray(joined, dtype=np.int32)


def _open(folder: Path, length: int) -> Tensor:
    try:
        form = read_json(folder / "windows.json")
        if not isinstance(form, dict) or type(form.get("count")) is not int or form["count"] < 1:
            raise ValueError("it has no count")
        if "sha256" not in form:
            raise ValueError("it has no digest")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / 'windows.json'} is damaged ({error}): delete {folder} to pack the text again"
        ) from None
    file = folder / "windows.i32"
    expected = form["count"] * length * 4
    found = file.stat().st_size if file.exists() else 0
    if found != expected:
        raise DataError(f"{file} has {found} bytes instead of {expected}: delete {folder} to pack the text again")
    if digest_of_file(file) != form["sha256"]:
        raise DataError(f"{file} is damaged: delete {folder} to pack the text again")
    mapped: Tensor = torch.from_file(str(file), shared=False, size=form["count"] * length, dtype=torch.int32)
    return mapped.reshape(form["count"], length)
