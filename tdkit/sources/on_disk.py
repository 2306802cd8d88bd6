"""Open a model of transformers without loading it: built from its config, with the weights left in their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdkit.errors import CheckpointError, SourceError, told_as
from tdkit.models import huggingface
from tdkit.models.checkpoint import is_saved
from tdkit.models.configs import check_size, read_config
from tdkit.models.on_disk import OnDisk
from tdkit.models.shards import Shards, weight_files
from tdkit.sources.models import TOKENIZER_FILES, class_of, model_sources, needs_code, tokenizer_of


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights are in files.

    Attributes:
        folder: the folder that it was opened from; that of the local copy for a hub name.
        model: the model, whose parameters are on the meta device, in eval mode.
        weights: the parameters of `model` in the files.
        tokenizer: the tokenizer, or None.
    """

    folder: Path
    model: nn.Module
    weights: OnDisk
    tokenizer: Any


def open_model(name: str | Path, *, dtype: torch.dtype | None = None) -> OpenedModel:
    """Open a folder of transformers with safetensors files, or a hub name, without reading the weights.

    No code from the folder or the hub is executed: the class of the model must be one that transformers ships.

    Args:
        name: a path, or a hub name, whose files are downloaded to the cache of the hub.
        dtype: the dtype in which weights are read; when None, that of the config or else of the first weight.

    Raises:
        SourceError: when there is no such model, it cannot be downloaded, it is a registered one, which has no such
            folder, or it needs code of its own.
        CheckpointError: when the weights are of another format, quantised, compressed already, or not those of the
            model.
    """
    huggingface.transformers()
    folder = _local(str(name))
    try:
        config = read_config(folder)
    except CheckpointError:  # a ValueError too
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise needs_code(str(name), "its config.json names Python files") from None
        raise SourceError(f"{folder} lacks a readable config.json: {error}") from None
    if getattr(config, "quantization_config", None) is not None or is_saved(folder):
        raise CheckpointError(f"{folder} holds quantised or factorised weights: compress the dense model")
    config._name_or_path = str(name)
    kind = class_of(config, str(name))
    shards = Shards(weight_files(folder))
    with told_as(SourceError, f"{folder / 'config.json'} describes a model that cannot be built"):
        check_size(huggingface.builder_of(kind), config, folder)
        model = huggingface.weightless_model(kind, config, dtype or _dtype_of(config, shards))
    weights = OnDisk(model, shards, huggingface.names_when_loaded(model, shards.tensors))
    generation = huggingface.generation_config(model, folder)
    if generation is not None:
        model.generation_config = generation
    return OpenedModel(folder, model, weights, tokenizer_of(folder))


def _local(name: str) -> Path:
    """Returns the folder of a path, or of the local copy of a hub name."""
    if Path(name).is_dir():
        return Path(name)
    if name.partition(":")[0] in model_sources.names():
        raise SourceError(f"'{name}' is a registered model, which is loaded as a whole: give a folder or a hub name")
    huggingface.transformers()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", *TOKENIZER_FILES]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"no model '{name}': it is no folder here, and the hub gave none ({reason})") from None


def _dtype_of(config: Any, shards: Shards) -> torch.dtype:
    stated = getattr(config, "dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    floats = (stored.dtype for stored in shards.tensors.values() if stored.dtype.is_floating_point)
    return next(floats, torch.float32)
