"""Load a saved model: its outputs are bit-identical, and no code of the folder is executed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import CheckpointError
from tdkit.models import huggingface
from tdkit.models.checkpoint.description import (
    Digest,
    buffer_dtypes,
    layers_of,
    place_of,
    read_description,
)
from tdkit.models.checkpoint.filling import fill
from tdkit.models.checkpoint.rewriting import places_of, rewrite
from tdkit.models.checkpoint.sizes import resize, sizes_of
from tdkit.models.checkpoint.tensors import without_markers
from tdkit.models.registration import attach
from tdkit.models.shards import WEIGHTS, Shards, same_bits, weight_files
from tdkit.models.sites import factorized_groups
from tdkit.models.small_heads import use_small_heads
from tdkit.models.swap import Swap, swapping
from tdkit.support.compatibility import unwrapped
from tdkit.support.files import digest_of_file


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

    No code from the folder is executed. The files are read once, tensor by tensor: a model that is built here, or given
    on the meta device, takes no more memory than its own size. One that holds numbers needs as much again, since it is
    changed only when all has been read and verified.

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
    shards = Shards(weight_files(folder))
    if verify and description["version"] == 1:
        _check_digest(digest_of_file(folder / WEIGHTS), description, folder)
    if model is None:
        model = huggingface.empty_model(description["model"], folder, class_)
    given, model = model, unwrapped(model)
    with swapping(model) as swap:
        rewrite(swap, layers, str(folder))
        resize(swap, sizes_of(description, place), str(folder))
        names, ties = _with_wrappers(model, without_markers(shards.tensors, layers), description["ties"])
        users = _users(model, shards, names, ties, folder, place)
        dtypes = buffer_dtypes(model, description, place)
        generation = huggingface.generation_config(model, folder)
        total = Digest(counts=verify and description["version"] > 1)
        values = _read(model, shards, users, folder, total)
        if total.counts:
            _check_digest(total.hexdigest(), description, folder)
        _check_buffers(model, values, str(folder / WEIGHTS))
        fill(swap, values, dtypes, device)
        attach(model)
        _finish(swap, given, model, generation)
        use_small_heads(model)  # the last step: nothing undoes it
    return given


def _finish(swap: Swap, given: nn.Module, model: Any, generation: Any) -> None:
    """Put the model into eval mode, and give it its generation config."""
    modes = [(module, module.training) for module in given.modules()]
    before = vars(model).get("generation_config")

    def restore() -> None:
        for module, training in modes:
            module.training = training
        if generation is not None:
            model.generation_config = before

    swap.when_undone(restore)
    if generation is not None:
        model.generation_config = generation
    given.eval()


def outline(folder: str | Path) -> Any:
    """Returns the saved transformers model of a folder with its tensors on the meta device, without reading them.

    Raises:
        CheckpointError: as in `load`.
    """
    folder = Path(folder)
    description = read_description(folder)
    model = huggingface.empty_model(description["model"], folder)
    with swapping(model) as swap:
        rewrite(swap, layers_of(description, str(place_of(folder))), str(folder))
    return model


def _check_digest(found: str, description: Mapping[str, Any], folder: Path) -> None:
    if found != description["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that was saved (its SHA-256 differs): copy it again, or pass "
            "verify=False if you changed it on purpose"
        )


def _users(
    model: nn.Module, shards: Shards, names: Mapping[str, str], ties: Mapping[str, Any], folder: Path, place: str
) -> dict[str, list[str]]:
    """Returns the entries of the model's state that each tensor of the files is for, after a check of all shapes.

    Args:
        names: the name of each tensor in the files, by its name in the model.
        ties: entries of the state that another one is written for.
    """
    origins = dict(names)
    for repeated, original in ties.items():
        if not isinstance(original, str) or original not in names:
            raise CheckpointError(f"{place} ties {repeated} to {original}, which is not in {WEIGHTS}")
        origins[repeated] = names[original]
    own = model.state_dict(keep_vars=True)
    problems = [f"lacks {name}" for name in own if name not in origins]
    problems += [f"has {name}, which the model lacks" for name in origins if name not in own]
    shapes = {name: shards.tensors[origins[name]].shape for name in own if name in origins}
    problems += [
        f"holds {name} as {shape}, the model as {tuple(own[name].shape)}"
        for name, shape in shapes.items()
        if shape != tuple(own[name].shape)
    ]
    kinds = {name: shards.tensors[origins[name]].dtype for name in shapes}
    problems += [
        f"holds {name} as {dtype}, the model as {own[name].dtype}"
        for name, dtype in kinds.items()
        if dtype.is_floating_point != own[name].is_floating_point()
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
    users: dict[str, list[str]] = {}
    for name in own:
        users.setdefault(origins[name], []).append(name)
    return users


def _read(
    model: nn.Module, shards: Shards, users: Mapping[str, Sequence[str]], folder: Path, digest: Digest
) -> dict[int, Tensor]:
    """Read every tensor of the files once.

    Args:
        digest: to which the tensors are added.

    Returns:
        The values of the model's tensors, by the ids of these, with their strides.
    """
    own = model.state_dict(keep_vars=True)
    found: dict[int, Tensor] = {}
    firsts: dict[int, str] = {}
    for stored in sorted(users):
        mapped = shards.mapped(stored)
        digest.add(stored, mapped)
        for name in users[stored]:
            key = id(own[name])
            if key not in found:
                firsts[key] = name
                with torch.inference_mode(False):  # factors are never inference tensors, wherever load is called
                    empty = torch.empty_strided(mapped.shape, own[name].stride(), dtype=mapped.dtype)
                    found[key] = empty.copy_(mapped)
            elif not same_bits(found[key], mapped):
                raise CheckpointError(
                    f"{folder / WEIGHTS}: {name} and {firsts[key]} are one tensor in this model, two in the file: "
                    "build the model without this tie (config.tie_word_embeddings=False in transformers)"
                )
    shards.close()
    return found


def _check_buffers(model: nn.Module, values: Mapping[int, Tensor], place: str) -> None:
    """Check the integers by which factors are read.

    Raises:
        CheckpointError: when they point beyond the tensors, or are no integers.
    """
    for matrix, users in factorized_groups(model):
        own = matrix.state_dict(keep_vars=True)
        fault = matrix.fault({name: values[id(tensor)] for name, tensor in own.items() if id(tensor) in values})
        if fault is not None:
            raise CheckpointError(f"{place} is damaged: of layer {users[0].name}, {fault}")


def _with_wrappers(
    model: nn.Module, names: Iterable[str], ties: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the names of tensors in the files, and the ties, by the names that the model gives its state."""
    places = places_of(model)

    def named(entry: Any) -> Any:
        layer, dot, own = str(entry).rpartition(".")
        return f"{places[layer]}{dot}{own}" if layer in places else entry

    return {named(name): name for name in names}, {named(a): named(b) for a, b in ties.items()}
