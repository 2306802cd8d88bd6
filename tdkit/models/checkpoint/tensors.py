"""The tensors of a saved folder: of a model's state, with each tied one once, and of the files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tdkit.errors import CheckpointError
from tdkit.models.checkpoint.description import INDEX, WEIGHTS, Layer
from tdkit.models.sites import factorized_layers
from tdkit.support.compatibility import COMPILED


def tied_as_in(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `state` with one tensor for all names of a tensor of `model`: gathered shards are copies of their own."""
    tied = dict(state)
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        original = first.setdefault(id(tensor), name)
        if isinstance(tensor, Tensor) and name in state and original in state:
            tied[name] = state[original]
    return tied


def tensors_and_ties(
    state: Mapping[str, Any], known: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors to write, on the CPU, and a map from each name of a tied tensor to the one it is written by.

    Args:
        state: the ``state_dict`` of a model.
        known: the names of tied tensors that the reader ties by itself; tensors with other names are written under
            each of their names. None for a reader of the map.

    Raises:
        CheckpointError: for state that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for key, tensor in state.items():
        name = key.replace(COMPILED, "")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"cannot save '{name}': extra state of type {type(tensor).__name__} is not a tensor")
        if tensor.is_meta:
            raise CheckpointError(f"cannot save '{name}': it is on the meta device and has no values")
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first and (known is None or name in known):
            ties[name] = first[place]
            continue
        first.setdefault(place, name)
        tensors[name] = tensor.detach().to("cpu", copy=False).contiguous()
    shared: dict[int, str] = {}
    for name, tensor in tensors.items():  # safetensors cannot store views of one storage
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.numel() and pointer in shared:
            tensors[name] = tensor.clone()
        shared[pointer] = name
    return tensors, ties


def markers(model: nn.Module) -> dict[str, Tensor]:
    """Returns a tensor of one number under the name of each dense weight that `model` holds as factors.

    A reader that knows no factors finds a tensor of another shape than that of its dense layer there and refuses the
    file; without it, transformers would fill such a layer with random numbers and warn.
    """
    found = {}
    for layer, module in factorized_layers(model):
        for weight in module.matrices:
            name = f"{layer}.{weight}".lstrip(".").replace(COMPILED, "")
            found[name] = torch.zeros(1, dtype=next(module.parameters()).dtype)
    return found


def without_markers(tensors: Mapping[str, Tensor], layers: Collection[Layer]) -> dict[str, Tensor]:
    """Returns the tensors of a file that are no `markers` of these layers."""
    names = {name for layer in layers for weight in layer.names for name in (weight, f"{weight}.weight")}
    return {name: tensor for name, tensor in tensors.items() if name not in names or tensor.shape != (1,)}


def weight_files(folder: Path) -> list[Path]:
    """Returns the files with the tensors of a saved folder: one, or the shards of an index.

    Raises:
        CheckpointError: when one is missing, or the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{names!r} are no names of files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from None
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}: the copy is incomplete")
    return [folder / name for name in names]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a saved folder by name, with `markers`.

    Raises:
        CheckpointError: when a file is missing, damaged or truncated.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or truncated: {error}") from None
    return tensors


def shapes_in(paths: Collection[str | Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the shapes and safetensors dtypes of the tensors in files, from their headers alone.

    Raises:
        CheckpointError: when a file is missing, damaged or truncated.
    """
    found = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, not a dict
                    part = file.get_slice(name)
                    found[name] = tuple(part.get_shape()), str(part.get_dtype())
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or truncated: {error}") from None
    return found
