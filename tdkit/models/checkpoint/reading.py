"""Load a saved model: its outputs are bit-identical, and no code of the folder is executed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import CheckpointError
from tdkit.models import huggingface
from tdkit.models.checkpoint.description import (
    WEIGHTS,
    Layer,
    buffer_dtypes,
    digest,
    layers_of,
    place_of,
    read_description,
)
from tdkit.models.checkpoint.rewriting import places_of, rewrite
from tdkit.models.checkpoint.tensors import read_tensors, without_markers
from tdkit.models.registration import attach
from tdkit.models.swap import swapping
from tdkit.support.compatibility import buffers_of, parameters_of, unwrapped


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    class_: str | type[nn.Module] | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> nn.Module:
    """Load a model that `save`, or ``save_pretrained`` of a compressed model, wrote; its outputs are bit-identical.

    No code from the folder is executed.

    Args:
        folder: the folder, or a hub name such as "user/model".
        model: a newly built dense model of the same architecture, which is modified in place. Required unless the
            saved model is of a class that transformers ships, or `class_` is given. It may be on the meta device: what
            the file holds is then put on `device`.
        class_: the class of a transformers model that transformers does not ship: itself, or its import path
            "package.module:Class", which is imported.
        revision: of a hub name: a branch, a tag or a commit.
        device: the device of the loaded model; when None, the CPU or the device of `model`.
        verify: compare the SHA-256 of the tensors with the recorded one.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: when the folder is missing, incomplete or damaged, holds no saved model, has a newer format,
            or does not match `model`.
    """
    if model is not None and class_ is not None:
        raise CheckpointError("give model= or class_=, not both")
    folder = huggingface.local_folder(folder, revision)
    description, place = read_description(folder), str(place_of(folder))
    layers = layers_of(description, place)
    tensors = _tensors(folder, description, layers, verify)
    if model is None:
        model = huggingface.empty_model(description["model"], folder, class_)
    given, model = model, unwrapped(model)
    with swapping(model) as swap:
        rewrite(swap, layers, str(folder))
        tensors, ties = _with_wrappers(model, tensors, description["ties"])
        state = _checked_state(model, tensors, ties, folder, place)
        dtypes = buffer_dtypes(model, description, place)
        generation = huggingface.generation_config(model, folder)
        _fill(model, state, dtypes, device)
    if generation is not None:
        model.generation_config = generation
    attach(model)
    return given.to(device).eval() if device is not None else given.eval()


def _tensors(folder: Path, description: Mapping[str, Any], layers: Sequence[Layer], verify: bool) -> dict[str, Tensor]:
    """Returns the tensors of a folder, compared with the recorded digest."""
    tensors = without_markers(read_tensors(folder), layers)
    if not verify:
        return tensors
    if description["version"] == 1:
        with (folder / WEIGHTS).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        found = digest(tensors)
    if found != description["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that was saved (its SHA-256 differs): copy it again, or pass "
            "verify=False if you changed it on purpose"
        )
    return tensors


def _checked_state(
    model: nn.Module, tensors: dict[str, Tensor], ties: Mapping[str, str], folder: Path, place: str
) -> dict[str, Tensor]:
    """Returns a tensor for every entry of the model's state, after a check of names and shapes; copies nothing."""
    state = dict(tensors)
    for repeated, original in ties.items():
        if not isinstance(original, str) or original not in tensors:
            raise CheckpointError(f"{place} ties {repeated} to {original}, which is not in {WEIGHTS}")
        state[repeated] = tensors[original]
    own = model.state_dict(keep_vars=True)
    problems = [f"lacks {name}" for name in own if name not in state]
    problems += [f"has {name}, which the model lacks" for name in state if name not in own]
    shared = [name for name in own if name in state]
    problems += [
        f"holds {name} as {tuple(state[name].shape)}, the model as {tuple(own[name].shape)}"
        for name in shared
        if state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder / WEIGHTS} " + "; ".join(problems[:5]) + more)
    absent = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in own]
    if absent:
        raise CheckpointError(
            f"{', '.join(absent[:3])} of the model given for {folder} is on the meta device, and no file holds it: "
            "build the model with its buffers on a device (accelerate.init_empty_weights leaves them there)"
        )
    holders: dict[int, str] = {}
    for name in shared:
        first = holders.setdefault(id(own[name]), name)
        if not torch.equal(state[first], state[name]):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} and {first} are one tensor in this model, two in the file: "
                "build the model without this tie (config.tie_word_embeddings=False in transformers)"
            )
    return state


def _with_wrappers(
    model: nn.Module, tensors: dict[str, Tensor], ties: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and ties by the names that the model gives its state."""
    places = places_of(model)

    def named(entry: Any) -> Any:
        layer, dot, own = str(entry).rpartition(".")
        return f"{places[layer]}{dot}{own}" if layer in places else entry

    return {named(name): tensor for name, tensor in tensors.items()}, {named(a): named(b) for a, b in ties.items()}


def _fill(
    model: nn.Module,
    state: dict[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device | str | None,
) -> None:
    _materialize(model, device or "cpu")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if state[name].dtype != tensor.dtype:
            _retype(model, name, state[name].dtype)
    model.load_state_dict(state)
    for name, dtype in dtypes.items():
        _retype(model, name, dtype)


def _retype(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Cast a parameter or buffer to `dtype`, so that loading does not round."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    tensor = getattr(owner, attribute)
    with torch.inference_mode(False):  # factors are never inference tensors, wherever load is called
        tensor.data = tensor.data.to(dtype)


def _materialize(model: nn.Module, device: torch.device | str) -> None:
    """Replace the tensors of `model` on the meta device by uninitialised ones on `device`; ties are kept."""
    made: dict[int, Tensor] = {}  # by the id of the tensor on the meta device
    old: list[Tensor] = []  # kept alive, so that no id comes back
    for module in model.modules():
        for owned in (parameters_of(module), buffers_of(module)):
            for name, tensor in owned.items():
                if tensor is None or not tensor.is_meta:
                    continue
                old.append(tensor)
                if id(tensor) not in made:
                    with torch.inference_mode(False):
                        empty = torch.empty_like(tensor, device=device)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                owned[name] = made[id(tensor)]  # type: ignore[assignment]
