"""Models and batches of the user's own code, by import path; batches also from files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import load_model as fill
from torch import Tensor, nn

from tdkit.errors import SourceError, did_you_mean
from tdkit.models.checkpoint import is_saved, load
from tdkit.sources.source import Source
from tdkit.support.devices import check_device

FILES = (".safetensors", ".npz")
INPUTS, LABELS = "inputs", "labels"


def is_import_path(text: str) -> bool:
    """Returns whether a text has the form ``package.module:name``, and there is no such file."""
    module, colon, name = text.partition(":")
    named = all(part.isidentifier() for part in [*module.split("."), *name.split(".")])
    return bool(colon) and named and not Path(text).exists()


def imported(path: str) -> Any:
    """Import what ``package.module:name`` says.

    Raises:
        SourceError: when the module cannot be imported, or has no such name.
    """
    if not is_import_path(path):
        raise SourceError(f"'{path}' is no import path: give MODULE:NAME, such as my_pkg.nets:build")
    module, _, name = path.partition(":")
    try:
        found: Any = import_module(module)
    except Exception as error:
        raise SourceError(f"'{path}': importing {module} failed: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise SourceError(f"'{path}': {module} has no '{part}'{did_you_mean(part, vars(found))}")
        found = getattr(found, part)
    return found


def build_model(
    path: str,
    weights: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Source:
    """Build a model by the function or class at an import path, fill it with weights, and put it in eval mode.

    The module is imported: this executes its code.

    Args:
        path: ``package.module:name`` of a function without arguments or a class that makes an `nn.Module`, or of one.
        weights: a .safetensors file with the state of the model, or a folder that `tdkit.save` wrote.
        dtype: of the weights; ignored for a folder that tdkit saved, whose dtypes are kept.
        device: the device of the model; the CPU when None.

    Raises:
        SourceError: when it cannot be imported or built, or the weights are not its.
        CheckpointError: when a folder does not match the model.
        OptionError: when the device is not available.
    """
    check_device(device)
    model = _called(path)
    if not isinstance(model, nn.Module):
        raise SourceError(f"'{path}' gives a {type(model).__name__}, not a torch.nn.Module")
    if weights is not None and is_saved(weights):
        model = load(weights, model=model)
    else:
        if weights is not None:
            _fill(model, Path(weights), path)
        model.to(dtype)
    return Source(path if weights is None else str(weights), model.eval().to(device), None)


def _called(path: str) -> Any:
    found = imported(path)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise SourceError(f"'{path}' failed: {type(error).__name__}: {error}") from error


def _fill(model: nn.Module, file: Path, path: str) -> None:
    if not file.is_file():
        raise SourceError(f"no weights {file}: give a .safetensors file or a folder that tdkit saved")
    if file.suffix != ".safetensors":
        raise SourceError(
            f"{file} is no .safetensors file, and tdkit reads no pickle: write the weights with "
            "safetensors.torch.save_model(model, file)"
        )
    try:
        fill(model, file)
    except (SafetensorError, RuntimeError) as error:
        raise SourceError(f"{file} does not hold the weights of '{path}': {error}") from None


def load_batches(spec: str, *, batch: int = 32) -> Iterable[Any]:
    """Load batches from files, or from the user's code by import path.

    A file holds tensors whose first dimension is that of examples: ``inputs`` and ``labels``, which give batches
    (inputs, labels), or ``inputs`` alone; or the arguments of forward by name, such as ``input_ids``,
    ``attention_mask`` and ``labels``, which give batches that are mappings.

    Args:
        spec: a .safetensors or .npz file; a folder of such files; or ``package.module:name`` of an iterable of batches,
            such as a DataLoader, or a function without arguments that returns one.
        batch: examples per batch, for files.

    Returns:
        An iterable that can be gone through again.

    Raises:
        SourceError: when there is no such file or function, or a file holds something else.
    """
    path = Path(spec)
    if path.exists():
        return [each for file in _files(path) for each in _divided(_tensors(file), file, batch)]
    if not is_import_path(spec):
        raise SourceError(
            f"no data '{spec}': give a {' or '.join(FILES)} file, a folder of these, or an import path MODULE:NAME"
        )
    found = _called(spec)
    if isinstance(found, Tensor | Mapping | str) or not isinstance(found, Iterable):
        raise SourceError(f"'{spec}' gives a {type(found).__name__}, not an iterable of batches, such as a DataLoader")
    return list(found) if isinstance(found, Iterator) else found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in FILES)
    if not files:
        raise SourceError(f"{path} holds no {' or '.join(FILES)} files")
    return files


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        if file.suffix == ".npz":
            import numpy as np

            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # of either reader, on a damaged file or on objects, which would need pickle
        raise SourceError(f"{file} cannot be read: {error}") from None
    raise SourceError(f"{file} is none of {', '.join(FILES)}: write it with safetensors.torch.save_file or numpy.savez")


def _divided(tensors: Mapping[str, Tensor], file: Path, batch: int) -> Iterator[Any]:
    sizes = {name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()}
    if len(set(sizes.values())) != 1 or not max(sizes.values()):
        shown = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        raise SourceError(f"{file} must hold tensors with equally many rows, one row per example; it holds {shown}")
    if INPUTS in tensors and not set(tensors) <= {INPUTS, LABELS}:
        others = ", ".join(sorted(set(tensors) - {INPUTS, LABELS}))
        raise SourceError(f"{file} holds '{INPUTS}' and {others}: name all entries as forward does, or leave them out")
    for start in range(0, max(sizes.values()), batch):
        part = {name: tensor[start : start + batch] for name, tensor in tensors.items()}
        if INPUTS not in part:
            yield part
        else:
            yield (part[INPUTS], part[LABELS]) if LABELS in part else part[INPUTS]
