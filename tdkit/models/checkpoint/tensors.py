"""The tensors of a saved folder: those of a model's state, with each tied one once, and those in its files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import CheckpointError
from tdkit.models.checkpoint.description import Layer
from tdkit.models.checkpoint.values import has_values, value_of
from tdkit.models.shards import DTYPES, Shards, Stored
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
        if type(tensor) not in (Tensor, nn.Parameter) and not tensor.is_meta:
            kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
            raise CheckpointError(
                f"cannot save '{name}': it is a {kind}, no plain tensor: round weights by "
                "tdkit.quantize instead, or save the model by the tool that made it"
            )
        if not has_values(name, tensor):
            raise CheckpointError(f"cannot save '{name}': it is on the meta device and has no values")
        where = id(tensor) if tensor.is_meta else tensor.data_ptr()
        place = (tensor.device, where, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first and (known is None or name in known):
            ties[name] = first[place]
            continue
        if tensor.numel() and place in first and tensor.is_meta:  # transformers would take it for an unknown tie
            tensor = value_of(name, tensor)
        first.setdefault(place, name)
        tensors[name] = tensor if tensor.is_meta else tensor.detach().to("cpu", copy=False).contiguous()
    shared: dict[int, str] = {}
    for name, tensor in tensors.items():  # safetensors cannot store views of one storage
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.numel() and not tensor.is_meta and pointer in shared:
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
        for weight, matrix in module.matrices.items():
            name = f"{layer}.{weight}".lstrip(".").replace(COMPILED, "")
            found[name] = torch.zeros(1, dtype=matrix.dtype)
    return found


def without_markers(tensors: Mapping[str, Stored], layers: Collection[Layer]) -> dict[str, Stored]:
    """Returns the tensors of a file that are no `markers` of these layers."""
    names = {name for layer in layers for weight in layer.names for name in (weight, f"{weight}.weight")}
    return {name: tensor for name, tensor in tensors.items() if name not in names or tensor.shape != (1,)}


def shapes_in(paths: Collection[str | Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the shapes and safetensors dtypes of the tensors in files, from their headers alone.

    Raises:
        CheckpointError: when a file is missing, damaged or truncated.
    """
    spelt = {dtype: name for name, dtype in DTYPES.items()}
    return {name: (stored.shape, spelt[stored.dtype]) for name, stored in Shards(paths).tensors.items()}
