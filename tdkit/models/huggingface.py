"""Support for transformers models: class look-up, construction without initialisation, config files.

transformers is imported on first use, never by ``import tdkit``.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdkit.errors import CheckpointError, MissingDependencyError, reason_of, told_as
from tdkit.models.configs import check_size, read_config
from tdkit.models.hosts.in_place import InPlaceLayer
from tdkit.support.compatibility import parameters_on_meta, unsharded_class

INSTALL = "pip install 'tdkit[hf]'"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]  # nothing that could be executed
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


def is_pretrained(model: nn.Module) -> bool:
    """Returns whether `model` is a model of transformers, or of a subclass of one."""
    package = sys.modules.get("transformers.modeling_utils")
    return package is not None and isinstance(model, package.PreTrainedModel)


def class_of(model: nn.Module) -> type[nn.Module]:
    """Returns the class of `model` before its parameters were factorised in place or sharded."""
    kind = unsharded_class(type(model))
    return kind.dense_class if issubclass(kind, InPlaceLayer) else kind


def is_transformers(model: nn.Module) -> bool:
    """Returns whether the class of `model` is shipped by transformers, so that it can be looked up by name."""
    kind = class_of(model)
    return is_pretrained(model) and shipped_class(kind.__name__) is kind


def shipped_class(name: object) -> Any:
    """Returns the model class of this name that transformers ships, or None."""
    package = transformers()
    kind = getattr(package, name, None) if isinstance(name, str) else None
    base = package.PreTrainedModel
    return kind if isinstance(kind, type) and issubclass(kind, base) and kind is not base else None


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Returns the class of the model and, for transformers, its attention implementation, which the config omits."""
    kind = class_of(model)
    path = f"{kind.__module__}:{kind.__qualname__}"
    if not is_pretrained(model):
        return {"kind": "module", "class": path}
    attention = getattr(model.config, "_attn_implementation", None)
    if is_transformers(model):
        return {"kind": "transformers", "class": kind.__name__, "attention": attention}
    return {"kind": "subclass", "class": path, "attention": attention}


def empty_model(description: Mapping[str, Any], folder: Path, class_: str | type | None = None) -> Any:
    """Build the dense model of a saved description, with its parameters on the meta device.

    Args:
        description: of the model, by `describe_model`.
        folder: with the config.
        class_: the class, or its import path "package.module:Class"; None for one that transformers ships.

    Raises:
        CheckpointError: when the model is not of transformers, its class is unknown, or its config cannot be read.
    """
    if class_ is None and description.get("kind") not in ("transformers", "subclass"):
        raise CheckpointError(
            f"{folder} holds a {description.get('class')}, which is not a transformers model: "
            "build the dense model and pass it, tdkit.load(folder, model=fresh), or on the command line "
            f"--model MODULE:NAME --weights {folder}"
        )
    transformers()
    kind = _shipped(description, folder) if class_ is None else _imported(class_)
    try:
        config = read_config(folder, None if class_ is None else kind)
    except CheckpointError:  # a ValueError too
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} lacks a readable config.json: {error}") from None
    if hasattr(config, "quantization_config"):  # describes the file; the model is dense
        del config.quantization_config
    if description.get("attention") in EXACT_ATTENTION:
        config._attn_implementation = description["attention"]
    check_size(kind, config, folder)
    with told_as(CheckpointError, f"{folder / 'config.json'} describes a model that cannot be built"):
        return _built(kind, config)


def _built(build: Callable[[Any], Any], config: Any) -> Any:
    """Build a model with its parameters on the meta device, tied, and its buffers computed."""
    from transformers.initialization import no_init_weights

    with parameters_on_meta(), no_init_weights():
        model = build(config)
    model.tie_weights()  # no_init_weights skips this too
    return model


def builder_of(kind: Any) -> Callable[[Any], Any]:
    """Returns the function that builds a model of the class `kind`, which may be ``AutoModel``, from a config."""
    if kind is transformers().AutoModel:
        return partial(kind.from_config, trust_remote_code=False)
    build: Callable[[Any], Any] = kind
    return build


def weightless_model(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a model of the class `kind` with its parameters on the meta device, tied as loading would tie them.

    Its buffers are real, since no file has those that are computed from the config.

    Args:
        kind: a class of models, or ``AutoModel``.
        dtype: of the parameters and, where the model does not set it, of the buffers.

    Raises:
        CheckpointError: when transformers keeps some parameters of this class in float32 whatever `dtype` is.
    """
    config.dtype = dtype
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        model = _built(builder_of(kind), config)
    finally:
        torch.set_default_dtype(before)
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


def _shipped(description: Mapping[str, Any], folder: Path) -> Any:
    name = description.get("class")
    if description.get("kind") == "subclass":
        raise CheckpointError(
            f"{folder} holds a {name}, a class of your own: import it and pass it, tdkit.load(folder, "
            f"class_={str(name).rpartition(':')[2]}), or give its import path, class_={str(name)!r}"
        )
    kind = shipped_class(name)
    if kind is None:
        raise CheckpointError(f"{folder}: this transformers ({transformers().__version__}) has no model class '{name}'")
    return kind


def _imported(class_: str | type) -> Any:
    """Returns the transformers model class that a caller gave, itself or by its import path."""
    kind: Any = class_
    if isinstance(class_, str):
        try:
            kind = pkgutil.resolve_name(class_)
        except (ImportError, AttributeError, ValueError) as error:
            raise CheckpointError(f"class_={class_!r} cannot be imported: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, transformers().PreTrainedModel)):
        raise CheckpointError(
            f"class_={class_!r} is no subclass of transformers.PreTrainedModel: build the model and pass it as model="
        )
    return kind


def local_folder(folder: str | Path, revision: str | None = None) -> Path:
    """Returns a local folder as it is, and the snapshot of a hub name, which is downloaded if it is not cached.

    Raises:
        CheckpointError: when a folder is given with a revision, or the hub has no such model.
    """
    path = Path(folder)
    if path.exists() or path.is_absolute() or (revision is None and str(folder).count("/") != 1):
        if revision is not None:
            raise CheckpointError(f"{folder} is a local folder, and only a hub name has a revision")
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(f"a model of the hub needs huggingface_hub: {INSTALL}") from error
    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder} does not exist here, and the hub gave none{at} ({reason})") from None


def cached_file(name: str, file: str) -> Path | None:
    """Returns a file of a hub model that is in the local cache, or None."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def generation_config(model: nn.Module, folder: Path) -> Any:
    """Returns the generation config of a saved transformers model, or None when there is none.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    path = folder / "generation_config.json"
    if not is_pretrained(model) or not path.is_file():
        return None
    try:
        return transformers().GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the class of the config makes of it
        raise CheckpointError(f"{path} is damaged: {reason_of(error)}") from None
