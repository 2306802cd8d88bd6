"""What tdkit knows of transformers: which class a model is, how to build it empty, what travels with it.

transformers is imported when one of its models is at hand, never by ``import tdkit``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tdkit.errors import CheckpointError, MissingDependencyError

INSTALL = "pip install 'tdkit[hf]'"
EXACT_ATTENTION = ("eager", "sdpa")  # the implementations every machine has: the saved choice is restored


def transformers() -> Any:
    """The transformers package.

    Raises:
        MissingDependencyError: with the command that installs it.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"this needs transformers: {INSTALL}") from error
    return transformers


def is_transformers(model: nn.Module) -> bool:
    """Whether `model` is of a class that transformers itself ships, so that its name is enough to build it."""
    package = sys.modules.get("transformers")
    return (
        package is not None
        and isinstance(model, package.PreTrainedModel)
        and (getattr(package, type(model).__name__, None) is type(model))
    )


def describe_model(model: nn.Module) -> dict[str, Any]:
    """How to build the model again: its class and, for transformers, what the config does not keep."""
    kind = type(model)
    if not is_transformers(model):
        return {"kind": "module", "class": f"{kind.__module__}.{kind.__qualname__}"}
    attention = getattr(model.config, "_attn_implementation", None)
    return {"kind": "transformers", "class": kind.__name__, "attention": attention}


def save_companions(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write config, generation config and tokenizer of a transformers model into `folder`."""
    if is_transformers(model):
        config: Any = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):  # of the file it was read from: the weights are dense floats now
            del config.quantization_config
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def empty_model(description: Mapping[str, Any], folder: Path) -> nn.Module:
    """The dense model that a saved description names, with uninitialised weights.

    Raises:
        CheckpointError: when the description needs a model from the caller, or names no class of transformers.
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
    model.tie_weights()  # left out together with the initialisation
    built: nn.Module = model
    return built


def generation_config(model: nn.Module, folder: Path) -> Any:
    """The generation config of a saved transformers model; None where there is none.

    Raises:
        CheckpointError: when it cannot be read.
    """
    path = folder / "generation_config.json"
    if not is_transformers(model) or not path.is_file():
        return None
    try:
        return transformers().GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
