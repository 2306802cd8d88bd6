"""The maximum number of positions of a language model."""

from __future__ import annotations

from torch import nn

from tdkit.errors import SourceError


def check_positions(model: nn.Module, context: int) -> None:
    """Check that windows fit into the position table of a model, whose forward would otherwise raise an IndexError.

    Models without such a table, with rotary or relative positions, accept windows of any length.

    Args:
        context: tokens per window.

    Raises:
        SourceError: when they do not fit; the message has the maximum length.
    """
    found = position_table(model)
    if found is not None and context > found[1]:
        name, limit = found
        raise SourceError(
            f"a window of {context} tokens is longer than the {limit} positions of {type(model).__name__} ({name}): "
            f"give a context of at most {limit}"
        )


def position_table(model: nn.Module) -> tuple[str, int] | None:
    """Returns the name of the smallest table of absolute positions and its maximum number of tokens, or None.

    A table is an embedding, dense or factorised, whose name is ``wpe`` or contains "position" but not "relative".
    """
    tables = {}
    for name, module in model.named_modules():
        rows, last = getattr(module, "num_embeddings", None), name.rpartition(".")[2].lower()
        if isinstance(rows, int) and (last == "wpe" or ("position" in last and "relative" not in last)):
            padding = getattr(module, "padding_idx", None)
            tables[name] = rows if padding is None else rows - padding - 1  # RoBERTa: positions start behind it
    if not tables:
        return None
    name = min(tables, key=lambda key: tables[key])
    stated = getattr(getattr(model, "config", None), "max_position_embeddings", None)  # OPT's table has two rows more
    return name, min(tables[name], stated) if isinstance(stated, int) else tables[name]
