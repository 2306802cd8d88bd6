"""Support for transformers models: class look-up, construction without initialisation, config and tokenizer files.

transformers is imported on first use, never by ``import tdkit``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdkit.errors import CheckpointError, MissingDependencyError

INSTALL = "pip install 'tdkit[hf]'"
EXACT_ATTENTION = ("eager", "sdpa")  # implementations available on every machine, restored by load


def transformers() -> Any:
    """Import and return the transformers package.

    Raises:
        MissingDependencyError: when it is not installed; the message has the command that installs it.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"this needs transformers: {INSTALL}") from error
    return transformers


def is_transformers(model: nn.Module) -> bool:
    """Returns whether the class of `model` is shipped by transformers, so that it can be looked up by name."""
    package = sys.modules.get("transformers")
    return (
        package is not None
        and isinstance(model, package.PreTrainedModel)
        and (getattr(package, type(model).__name__, None) is type(model))
    )


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Returns the class of the model and, for transformers, its attention implementation, which the config omits."""
    kind = type(model)
    if not is_transformers(model):
        return {"kind": "module", "class": f"{kind.__module__}.{kind.__qualname__}"}
    attention = getattr(model.config, "_attn_implementation", None)
    return {"kind": "transformers", "class": kind.__name__, "attention": attention}


def save_companions(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write the config and generation config of a transformers model, and the tokenizer if given, to `folder`."""
    if is_transformers(model):
        config: Any = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):  # describes the original file; the weights are dense floats now
            del config.quantization_config
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def empty_model(description: Mapping[str, Any], folder: Path) -> nn.Module:
    """Build the dense model of a saved description, with uninitialised weights.

    Raises:
        CheckpointError: when the model is not of transformers, its class is unknown, or its config cannot be read.
    """
    if description.get("kind") != "transformers":
        raise CheckpointError(
            f"{folder} holds a {description.get('class')}, which is not a transformers model: "
            "build the dense model and pass it, tdkit.load(folder, model=fresh)"
        )
    package = transformers()
    name = str(description.get("class"))
    kind = getattr(package, name, None)
    if not (isinstance(kind, type) and issubclass(kind, package.PreTrainedModel)):
        raise CheckpointError(f"{folder}: this transformers ({package.__version__}) has no model class '{name}'")
    try:
        config = package.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} lacks a readable config.json: {error}") from None
    if description.get("attention") in EXACT_ATTENTION:
        config._attn_implementation = description["attention"]
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = kind(config)
    model.tie_weights()  # no_init_weights skips this too
    built: nn.Module = model
    return built


def weightless_model(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a model of the class `kind` with its parameters on the meta device, tied as loading would tie them.

    Its buffers are real, since no file has those that are computed from the config.

    Args:
        kind: a class of models, or ``AutoModel``.
        dtype: of the parameters and, where the model does not set it, of the buffers.

    Raises:
        CheckpointError: when transformers keeps some parameters of this class in float32 whatever `dtype` is.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config.dtype = dtype
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = kind.from_config(config) if kind is transformers().AutoModel else kind(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()  # no_init_weights skips this too
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype.itemsize < 4 else set()
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    inside = sorted(part for part in kept if any(part in name for name, _ in model.named_parameters()))
    if inside:
        raise CheckpointError(
            f"transformers keeps {', '.join(inside)} of a {type(model).__name__} in float32: give dtype=torch.float32"
        )
    built: nn.Module = model.eval()
    return built


def names_when_loaded(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Returns the name that ``from_pretrained`` gives to each tensor of a file, without those that it merges.

    It removes or adds the name of the base model, and renames what older versions called otherwise.

    Args:
        model: a model of transformers.
        names: of the tensors in the files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    steps = get_model_conversion_mapping(model)
    merging = [step for step in steps if isinstance(step, WeightConverter)]
    renaming = [step for step in steps if not isinstance(step, WeightConverter)]
    state, base = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        renamed, merged = rename_source_key(name, renaming, merging, base, state)
        if renamed not in state:
            renamed, merged = rename_source_key(name, [], [], base, state)
        if merged is None:
            found[name] = renamed
    return found


def generation_config(model: nn.Module, folder: Path) -> Any:
    """Returns the generation config of a saved transformers model, or None when there is none.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    path = folder / "generation_config.json"
    if not is_transformers(model) or not path.is_file():
        return None
    try:
        return transformers().GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
