"""What a saved folder says about its model: a description as JSON.

A folder of a transformers model with factors has it in ``config.json``, as the ``quantization_config`` of the method
"tdkit", so that transformers reads the folder too. Other folders have it in ``tdkit.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import Decomposition, FactorizedMatrix
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import CheckpointError, TdkitError, told_as
from tdkit.models import huggingface
from tdkit.models.checkpoint.values import value_of
from tdkit.models.shards import INDEX, WEIGHTS
from tdkit.models.sites import FactorizedUser, factorized_groups, resized_layers
from tdkit.shapes import Shape, by, is_weight_shape
from tdkit.support.compatibility import COMPILED
from tdkit.support.documents import read_json

FORMAT = "tdkit"
FORMAT_VERSION = 2  # 1 has the SHA-256 of the weights file, 2 that of the tensors
DESCRIPTION = "tdkit.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Layer:
    """One factorised matrix and the layers that use it.

    Attributes:
        names: of the weights, as in `weight_name`.
        options: of the layers, as `Host.options`.
        shape: of the weight.
        decomposition: complete.
        error: relative error of the fit, or None.
    """

    names: list[str]
    options: list[dict[str, Any]]
    shape: Shape
    decomposition: Decomposition
    error: float | None

    @classmethod
    def read(cls, entry: Any, place: str) -> Layer:
        """Returns the layer that an entry of a description stands for.

        Raises:
            CheckpointError: when it stands for none; the message begins with `place`.
        """
        forms = {"names": list, "options": list, "shape": list, "decomposition": dict}
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"{place}: {entry!r} is not a layer")
        for key, form in forms.items():
            if not isinstance(entry.get(key), form):
                raise CheckpointError(f"{place}: '{key}' is missing or malformed")
        names, options, shape, error = entry["names"], entry["options"], entry["shape"], entry.get("error")
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise CheckpointError(f"{place}: names={names!r} must be layer names")
        if len(options) != len(names) or not all(isinstance(option, dict) for option in options):
            raise CheckpointError(f"{place}: options={options!r} must be one set for each of {len(names)} names")
        if not is_weight_shape(shape):
            raise CheckpointError(
                f"{place}: shape={shape!r} must be two sizes or more, of a weight that a machine holds"
            )
        if isinstance(error, bool) or not isinstance(error, int | float | None):
            raise CheckpointError(f"{place}: error={error!r} must be a number")
        try:
            kind = decomposition(entry["decomposition"])
            with told_as(CheckpointError, f"{kind.describe()} cannot make factors of {by(shape)}"):
                kind.empty(tuple(shape), device="meta")
        except TdkitError as problem:
            raise CheckpointError(f"{place}: {problem}") from None
        return cls(names, options, tuple(shape), kind, error)


def describe(model: nn.Module, tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> dict[str, Any]:
    """Returns the description of a model, as JSON-able values.

    Args:
        model: with or without factorised layers.
        tensors: what is written of its state.
        ties: the written name of each tensor that is not written under this name.

    Raises:
        CheckpointError: when a decomposition could not be read again.
    """
    return {
        "version": FORMAT_VERSION,
        "model": huggingface.describe_model(model),
        "dtype": _spelt(next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)),
        "layers": [_described(matrix, users) for matrix, users in factorized_groups(model)],
        "sizes": {name.replace(COMPILED, ""): list(shape) for name, shape, _ in resized_layers(model)},
        "ties": dict(ties),
        "buffers": _rounded_buffers(model),
        "sha256": digest(tensors),
    }


def _spelt(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def main_dtype(description: Mapping[str, Any]) -> torch.dtype | None:
    """Returns the dtype of the first tensor in floating point, which transformers takes for that of the model."""
    found = getattr(torch, str(description.get("dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def _described(matrix: FactorizedMatrix, users: list[FactorizedUser]) -> dict[str, Any]:
    names = [user.name.replace(COMPILED, "") for user in users]
    spec = spec_of(matrix.decomposition)
    try:
        back = decomposition(json.loads(json.dumps(spec)))
    except (TdkitError, TypeError) as error:
        raise CheckpointError(
            f"{names[0]}: {type(matrix.decomposition).__name__} could not be read again from {spec}: {error}. Register "
            "it through the entry-point group tdkit.decompositions, with JSON-able options"
        ) from None
    if back != matrix.decomposition:
        raise CheckpointError(
            f"{names[0]}: {type(matrix.decomposition).__name__} would be read again as another decomposition, "
            f"{back!r}: '{matrix.decomposition.name}' is registered for {type(back).__module__}.{type(back).__name__}"
        )
    return {
        "names": names,
        "shape": list(matrix.sizes),
        "decomposition": spec,
        "options": [user.module.options() for user in users],
        "error": matrix.error,
    }


def _rounded_buffers(model: nn.Module) -> dict[str, str]:
    """Returns the dtypes of non-persistent buffers, which a new model may create in another dtype."""
    saved = model.state_dict()
    return {
        name.replace(COMPILED, ""): _spelt(buffer.dtype)
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point()
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the names, dtypes, shapes and values of tensors, whatever files they lie in."""
    total = Digest()
    for name in sorted(tensors):
        total.add(name, value_of(name, tensors[name]))
    return total.hexdigest()


class Digest:
    """The SHA-256 of tensors, which are added in the order of their names.

    Args:
        counts: False for a digest that nobody asks for, which takes no time.
    """

    def __init__(self, *, counts: bool = True) -> None:
        self.counts = counts
        self._total = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        if not self.counts:
            return
        tensor = tensor.detach().cpu().contiguous()
        self._total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            self._total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._total.hexdigest()


def is_saved(folder: str | Path) -> bool:
    """Returns whether a folder holds a description, which need not be whole."""
    return _place(Path(folder)) is not None


def place_of(folder: str | Path) -> Path:
    """Returns the file with the description of a folder.

    Raises:
        CheckpointError: when there is none.
    """
    folder = Path(folder)
    place = _place(folder)
    if place is None:
        what = (
            f"holds no {DESCRIPTION}, nor a {CONFIG} of a compressed model: it was not saved by tdkit"
            if folder.exists()
            else "does not exist"
        )
        raise CheckpointError(f"{folder} {what}")
    return place


def _place(folder: Path) -> Path | None:
    if (folder / DESCRIPTION).is_file():
        return folder / DESCRIPTION
    config = folder / CONFIG
    try:
        found = read_json(config).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return config if isinstance(found, dict) and found.get("quant_method") == FORMAT else None


def read_description(folder: str | Path) -> dict[str, Any]:
    """Returns the checked description of a saved folder.

    Raises:
        CheckpointError: when the folder holds none, or the description is damaged or of a newer format.
    """
    folder = Path(folder)
    path = place_of(folder)
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}: the copy is incomplete")
    try:
        description = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if path.name == CONFIG:
        description = description["quantization_config"]
    elif not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a tdkit description")
    check_description(description, str(path))
    return {key: value for key, value in description.items() if key not in ("format", "quant_method")}


def check_description(description: Mapping[str, Any], place: str) -> None:
    """Check the version and the outer form of a description.

    Raises:
        CheckpointError: when it is of a newer format, or malformed.
    """
    version = description.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{place} has format version {version!r}, this tdkit reads up to {FORMAT_VERSION}: update tdkit"
        )
    for key, kind in (("model", dict), ("layers", list), ("ties", dict), ("sha256", str)):
        if not isinstance(description.get(key), kind):
            raise CheckpointError(f"{place} is damaged: '{key}' is missing or malformed")


def layers_of(description: Mapping[str, Any], place: str) -> list[Layer]:
    """Returns the checked layers of a description.

    Raises:
        CheckpointError: when one is malformed, or its decomposition is not installed.
    """
    return [Layer.read(entry, f"{place}: layer {number}") for number, entry in enumerate(description["layers"])]


def buffer_dtypes(model: nn.Module, description: Mapping[str, Any], place: str) -> dict[str, torch.dtype]:
    """Returns the saved dtypes of non-persistent buffers that differ from those in the model, by buffer name.

    Raises:
        CheckpointError: when they are malformed.
    """
    dtypes = description.get("buffers", {})
    own = {name.replace(COMPILED, ""): (name, buffer) for name, buffer in model.named_buffers()}
    if not isinstance(dtypes, dict):
        raise CheckpointError(f"{place} is damaged: 'buffers' is malformed")
    found = {}
    for name, spelt in dtypes.items():
        dtype = getattr(torch, spelt, None) if isinstance(spelt, str) else None
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{place} is damaged: buffer {name} has no dtype {spelt!r}")
        if name in own and own[name][1].dtype != dtype:
            found[own[name][0]] = dtype
    return found
