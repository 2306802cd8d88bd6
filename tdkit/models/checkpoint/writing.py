"""Save a model with or without factors, completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from tdkit.errors import CheckpointError
from tdkit.models import huggingface
from tdkit.models.card import Card
from tdkit.models.checkpoint.description import DESCRIPTION, FORMAT, describe, is_saved
from tdkit.models.checkpoint.tensors import tensors_and_ties, tied_as_in
from tdkit.models.checkpoint.values import late_state
from tdkit.models.registration import attach
from tdkit.models.shards import WEIGHTS
from tdkit.models.sites import is_compressed
from tdkit.support.compatibility import find_buffers_as_parameters, gathered_state, is_sharded, unwrapped
from tdkit.support.files import whole_folder
from tdkit.support.processes import is_main_process


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    card: bool | Card = False,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write the tensors of `model`, a description and, for transformers models, the config to `folder`.

    The files are written to a temporary folder next to `folder`, which is then renamed: an interrupted save
    leaves nothing behind, and only a complete save replaces an earlier one. Wrappers (``torch.compile``, data
    parallelism, FSDP) are left out: the tensors have the names that they have in the model inside.

    The folder of a compressed transformers model is the one that ``model.save_pretrained(folder)`` writes:
    ``from_pretrained`` reads it once tdkit is imported.

    With several ``torch.distributed`` processes only rank 0 writes, and the others return at once: call
    ``torch.distributed.barrier()`` before they read the folder. All of them call this function.

    Args:
        model: a model with or without factorised layers.
        folder: must not exist or be empty, unless `overwrite` is set and it holds an earlier save.
        tokenizer: a transformers tokenizer or processor to save in the same folder.
        overwrite: replace an earlier save.
        card: write a model card, README.md; a `Card` adds what the model does not know of itself.
        max_shard_size: of a weights file of a transformers model, in bytes or as "5GB"; larger models get several.

    Returns:
        The folder.

    Raises:
        CheckpointError: when the folder holds other files or, without `overwrite`, an earlier save, or when the
            model has state that cannot be saved.
    """
    folder = Path(folder)
    sharded = is_sharded(model)
    if not is_main_process():
        if sharded:
            gathered_state(model)
        return folder
    check_target(folder, overwrite)
    inner = unwrapped(model)
    state = tied_as_in(inner, gathered_state(model)) if sharded else late_state(inner)
    _check_model(inner)
    with whole_folder(folder) as target:
        if huggingface.is_pretrained(inner):
            _save_pretrained(inner, state, target, max_shard_size)
        else:
            tensors, ties = tensors_and_ties(inner.state_dict() if state is None else state)
            _write_description(describe(inner, tensors, ties), target)
            save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        if card:
            (card if isinstance(card, Card) else Card()).write(inner, target)
    return folder


def _save_pretrained(model: Any, state: Mapping[str, Any] | None, target: Path, max_shard_size: int | str) -> None:
    """Let transformers write its files; the model and its config stay as they are."""
    config = model.config
    before, own = dict(vars(config)), dict(vars(model))
    options: dict[str, Any] = {"state_dict": state, "max_shard_size": max_shard_size}
    try:
        if is_compressed(model):
            attach(model)
        else:  # an ordinary folder of transformers, with what load needs beside it
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            tensors, ties = tensors_and_ties(model.state_dict() if state is None else state, {*tied, *tied.values()})
            _write_description(describe(model, tensors, ties), target)
            options |= {"state_dict": tensors, "save_original_format": False}
            model._keys_to_ignore_on_save = None
            vars(model).pop("hf_quantizer", None)  # describes the original file; the weights are dense floats now
            vars(config).pop("quantization_config", None)
        if state is not None:
            find_buffers_as_parameters(model)
        model.save_pretrained(target, **options)
    finally:
        for owner, saved in ((config, before), (model, own)):
            vars(owner).clear()
            vars(owner).update(saved)


def _write_description(description: Mapping[str, Any], target: Path) -> None:
    text = json.dumps({"format": FORMAT, **description}, indent=2) + "\n"
    (target / DESCRIPTION).write_text(text, encoding="utf-8")


def _check_model(model: nn.Module) -> None:
    if hasattr(model, "merge_and_unload") and hasattr(model, "peft_config"):
        raise CheckpointError(
            "the model holds adapters of PEFT: merge them, model.merge_and_unload(), and save the result, or save the "
            "adapters alone with model.save_pretrained"
        )


def check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give a folder")
    if any(folder.iterdir()):
        if not is_saved(folder):
            raise CheckpointError(f"{folder} holds other files: give a new folder")
        if not overwrite:
            raise CheckpointError(f"{folder} holds a saved model: pass overwrite=True, or give a new folder")
