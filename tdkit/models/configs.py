"""Configs of transformers from folders that anybody may have written: nothing is fetched, run or built on their word.

A config can ask for a kernel from the hub, and for more memory than any machine has. Both are refused before a model is
built: what is built must not be larger than what the files beside the config hold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tdkit.errors import CheckpointError
from tdkit.models.shards import Shards
from tdkit.support.compatibility import TooManyParameters, parameters_on_meta

ATTENTION = ("eager", "sdpa", "flex_attention")  # what torch and transformers carry themselves
EXPERTS = ("eager", "grouped_mm", "batched_mm")
FREE_ELEMENTS = 2**22  # that a model may have whatever the files hold
FREE_PARAMETERS = 1000
FREE_BYTES = 2**26  # of buffers, which are computed from the config


def read_config(name: str | Path, kind: Any = None, *, local: bool = True) -> Any:
    """Returns the config of a folder or of a hub name.

    Args:
        name: the folder or the hub name.
        kind: a class of models, whose class of configs is read; that which the config names when None.
        local: read local files only.

    Raises:
        CheckpointError: when the config asks for code that neither torch nor transformers carries.
        OSError, ValueError: when there is no readable config, or it names Python files; whatever transformers raises
            for a damaged one is a ValueError.
    """
    from transformers import AutoConfig

    try:
        if kind is not None:
            config = kind.config_class.from_pretrained(name, local_files_only=local)
        else:
            config = AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the class of any config
        raise ValueError(f"it is damaged: {type(error).__name__}: {error}") from None
    for part in _parts_of(config):
        for entry, known in (("attn_implementation", ATTENTION), ("experts_implementation", EXPERTS)):
            asked = getattr(part, f"_{entry}", None)
            if asked is not None and asked not in known:
                raise CheckpointError(
                    f"{name}: its config.json asks for {entry}={asked!r}, which may be code from elsewhere: only "
                    f"{', '.join(known)} are taken from a folder. Remove the entry, and choose another implementation "
                    "in Python once the model is loaded"
                )
    return config


def _parts_of(config: Any, depth: int = 0) -> Iterator[Any]:
    """Iterate over a config and the configs inside it."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig) and depth < 8:
            yield from _parts_of(value, depth + 1)


def check_size(build: Callable[[Any], Any], config: Any, folder: Path) -> None:
    """Build the model of a config without any memory, and compare its size with that of the files in `folder`.

    Args:
        build: makes the model from a copy of `config`.
        folder: with safetensors files; when it has none, those of other formats are taken by their size.

    Raises:
        CheckpointError: when the model is far larger than the files, or its class refuses the config.
    """
    from transformers.initialization import no_init_weights

    tensors, held = _held_in(folder)
    most = 4 * tensors + FREE_PARAMETERS
    try:
        with torch.device("meta"), no_init_weights(), parameters_on_meta(most):
            model = build(copy.deepcopy(config))
    except TooManyParameters:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model of more than {most:,} parameters, and the files hold "
            f"{tensors:,} tensors: one of them is damaged or of another model"
        ) from None
    except Exception:  # of any class: what cannot be built at all says so when it is, and some need numbers for it
        return
    elements = sum(parameter.numel() for parameter in model.parameters())
    computed = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    for what, size, limit in (
        ("weights of {:,} numbers", elements, 4 * held + FREE_ELEMENTS),
        ("buffers of {:,} bytes", computed, 4 * held + FREE_BYTES),
    ):
        if size > limit:
            raise CheckpointError(
                f"{folder / 'config.json'} describes {what.format(size)}, and the files hold {held:,} bytes: one of "
                "them is damaged or of another model"
            )


def _held_in(folder: Path) -> tuple[int, int]:
    """Returns the number of tensors in the files of a folder, and their bytes."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        stored = Shards(files).tensors.values()
        return len(stored), sum(each.bytes for each in stored)
    others = [path for pattern in ("*.bin", "*.gguf") for path in folder.glob(pattern)]
    return 10**5, sum(path.stat().st_size for path in others)
