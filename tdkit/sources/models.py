"""Load models by folder, registered name or hub name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from tdkit.errors import SourceError, TdkitError, did_you_mean, reason_of, told_as
from tdkit.models import huggingface
from tdkit.models.checkpoint import is_saved, load
from tdkit.models.configs import check_size, read_config
from tdkit.registry import Registry
from tdkit.sources.source import ModelSource, Source, call_source, not_callable
from tdkit.support.devices import check_device

model_sources: Registry[ModelSource] = Registry(
    "tdkit.models", "model source", {"smollm2": "tdkit.sources.smollm2:load_smollm2"}, not_callable
)

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

_log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken")


def load_model(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Source:
    """Load a model from a folder (of tdkit or transformers), by registered name or by hub name, in eval mode.

    A local folder takes precedence over a registered name (entry points ``tdkit.models``), and that over the hub.
    No code from a folder or the hub is executed: the class of the model must be one that transformers ships.

    Args:
        name: a path; ``NAME`` or ``NAME:PART`` of a registered model, such as ``smollm2``; or a hub name, such as
            ``openai-community/gpt2``.
        dtype: the dtype of the weights; ignored for a folder that tdkit saved, whose dtypes are kept.
        device: the device of the model; the CPU when None.

    Returns:
        The model with its tokenizer, which is None when there is none.

    Raises:
        OptionError: when the device is not available.
        SourceError: when there is no such model, it cannot be downloaded, or it needs code of its own.
        RegistryError: when two packages provide the name, or its source fails to import.
        MissingDependencyError: when a package is needed that is not installed.
    """
    check_device(device)
    path = Path(name)
    if path.is_file():
        raise SourceError(
            f"{name} is a file, and a model is given as a folder: one that tdkit saved, or one of transformers with "
            "config.json and the weights. A file of weights alone goes with the code that builds its model: "
            f"--model MODULE:NAME --weights {name} on the command line; in Python, load the weights and call "
            "tdkit.compress(model, ...)"
        )
    if is_saved(path):
        source = Source(name, load(path), tokenizer_of(path))
    elif not (path / "config.json").is_file() and name.partition(":")[0] in model_sources.names():
        source = _registered(name, dtype)
    else:
        source = _pretrained(name, dtype)
    source.model.eval()
    if device is not None:
        source.model.to(device)
    return source


def _registered(name: str, dtype: torch.dtype) -> Source:
    def load(source: ModelSource, part: str | None) -> object:
        return source(part, dtype=dtype)

    return call_source(model_sources, name, load, Source)


def _pretrained(name: str, dtype: torch.dtype) -> Source:
    huggingface.transformers()
    if (Path(name) / "adapter_config.json").is_file():  # whose base model transformers would load in its place
        raise SourceError(
            f"{name} holds an adapter: load its base model, merge the adapter into it, and save the result"
        )
    try:
        config = read_config(name, local=False)
        kind = class_of(config, name)
        if Path(name).is_dir():
            check_size(huggingface.builder_of(kind), config, Path(name))
        with told_as(SourceError, f"'{name}' is damaged", but=(OSError, ValueError)):
            model = kind.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except TdkitError:  # some are ValueErrors too
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            raise needs_code(name, "its config.json names Python files") from None
        names = model_sources.names()
        raise SourceError(
            f"no model '{name}'{did_you_mean(name, names) or '.'} It is no folder of a model here, none of the "
            f"registered models ({', '.join(names)}), and the hub gave none ({reason}). Offline, give the path of a "
            "local folder"
        ) from None
    for parameter in model.parameters():  # memory-mapped at any alignment, which changes the last bits of results
        parameter.data = parameter.data.clone()
    return Source(name, model, tokenizer_of(name))


def class_of(config: Any, name: str) -> Any:
    """Returns the transformers class that a config names, or AutoModel when it names none.

    Raises:
        SourceError: when transformers has no such model class, or the class belongs to another type of model.
    """
    package = huggingface.transformers()
    named = config.architectures
    if not named:
        if type(config) not in package.MODEL_MAPPING:
            raise needs_code(name, "its config.json names Python files, or no model that transformers ships")
        return package.AutoModel
    wanted = named[0] if isinstance(named, list | tuple) else named
    kind = huggingface.shipped_class(wanted)
    if kind is None:
        raise needs_code(
            name, f"its config.json names the class {wanted!r}, which transformers {package.__version__} does not ship"
        )
    if not any(isinstance(each, kind.config_class) for each in (config, *vars(config).values())):
        raise SourceError(
            f"'{name}' is damaged: its config.json names the class {wanted}, which does not go with the model type "
            f"{config.model_type!r}"
        )
    return kind


def needs_code(name: str, why: str) -> SourceError:
    return SourceError(
        f"'{name}' needs code of its own ({why}), and tdkit executes no code from a model's folder: build the model in "
        "Python, load its weights and call tdkit.compress(model, ...)"
    )


def tokenizer_of(name: str | Path) -> Any:
    """Returns the tokenizer of a folder or hub name, or None: functions that need one raise their own error."""
    folder = Path(name)
    if folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        return None  # transformers would make up an empty one from the model's type
    try:
        return huggingface.transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of any class of tokenizers
        if folder.is_dir():
            _log.warning("the tokenizer in %s is left out, it cannot be read: %s", name, reason_of(error))
        return None
