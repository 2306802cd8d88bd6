"""Save a compressed model as ``tdkit.json`` + ``model.safetensors``, completely or not at all, and load it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tdkit.decompositions.base import Decomposition, FactorizedMatrix
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import CheckpointError, TdkitError
from tdkit.models import huggingface
from tdkit.models.hosts.base import Host, become, install
from tdkit.models.hosts.in_place import parametrized
from tdkit.models.hosts.registered import host_of
from tdkit.models.shards import Entry, write_tensors
from tdkit.models.sites import FactorizedUser, changes_in_place, factorized_groups, replace_module
from tdkit.models.ties import follow_ties
from tdkit.shapes import Shape, by
from tdkit.support.compatibility import COMPILED, parameters_of, shallow_copy, uncompiled
from tdkit.support.files import whole_folder
from tdkit.support.processes import is_main_process

FORMAT = "tdkit"
FORMAT_VERSION = 1
DESCRIPTION = "tdkit.json"
WEIGHTS = "model.safetensors"
BUILD_IT = "build it on a device that holds weights"


def save(model: nn.Module, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False) -> Path:
    """Write the tensors of `model`, a description and, for transformers models, the config to `folder`.

    The files are written to a temporary folder next to `folder`, which is then renamed: an interrupted save
    leaves nothing behind, and only a complete save replaces an earlier one.

    With several ``torch.distributed`` processes only rank 0 writes, and the others return at once: call
    ``torch.distributed.barrier()`` before they read the folder.

    Args:
        model: a model with or without factorised layers.
        folder: must not exist or be empty, unless `overwrite` is set and it holds an earlier save.
        tokenizer: a transformers tokenizer to save in the same folder.
        overwrite: replace an earlier save.

    Returns:
        The folder.

    Raises:
        CheckpointError: when the folder holds other files or, without `overwrite`, an earlier save, or when the
            model has state that cannot be saved.
    """
    away = [name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and tensor.is_meta]
    if away:
        raise CheckpointError(f"cannot save '{away[0]}': it is on the meta device and has no values")
    return save_with(model, folder, lambda tensor: tensor, tokenizer=tokenizer, overwrite=overwrite)


def save_with(
    model: nn.Module,
    folder: str | Path,
    values: Callable[[Tensor], Tensor],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """Like `save`, for a model that need not hold its tensors: each is asked for when it is written.

    Args:
        values: returns the values of a parameter or buffer of `model`, in its dtype and shape, on any device.
    """
    folder = Path(folder)
    if not is_main_process():
        return folder
    check_target(folder, overwrite)
    model = uncompiled(model)
    layers = [_describe(matrix, users) for matrix, users in factorized_groups(model)]
    entries, ties = _entries(model, values)
    with whole_folder(folder) as target:
        write_tensors(target / WEIGHTS, entries, {"format": "pt"})
        description = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": huggingface.describe_model(model),
            "layers": layers,
            "ties": ties,
            "buffers": _rounded_buffers(model),
            "sha256": _digest(target / WEIGHTS),
        }
        huggingface.save_companions(model, tokenizer, target)
        (target / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return folder


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> nn.Module:
    """Load a model that `save` wrote; its outputs are bit-identical to those of the saved model.

    No code from the folder is executed.

    Args:
        folder: the folder that `save` wrote.
        model: a newly built dense model of the same architecture, which is modified in place. Required unless the
            saved model is of a class that transformers ships.
        device: the device of the loaded model; when None, the CPU or the device of `model`.
        verify: compare the SHA-256 of the weights file with the recorded one.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: when the folder is missing, incomplete or damaged, holds no saved model, has a newer format,
            or does not match `model`.
    """
    folder = Path(folder)
    description = read_description(folder)
    if verify and _digest(folder / WEIGHTS) != description["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that was saved (its SHA-256 differs): copy it again, or pass "
            "verify=False if you changed it on purpose"
        )
    tensors = _read_tensors(folder)
    if model is None:
        model = huggingface.empty_model(description["model"], folder)
    given, model = model, uncompiled(model)
    before = _Before()
    try:
        _rewrite(model, description["layers"], folder / DESCRIPTION, before)
        tensors, ties = _with_wrappers(model, tensors, description["ties"])
        state = _checked_state(model, tensors, ties, folder)
        dtypes = _buffer_dtypes(model, description.get("buffers", {}), folder)
        generation = huggingface.generation_config(model, folder)
        _fill(model, state, dtypes)
    except BaseException:
        before.restore(model)
        raise
    if generation is not None:
        model.generation_config = generation
    return given.to(device).eval() if device is not None else given.eval()


def read_description(folder: str | Path) -> dict[str, Any]:
    """Returns the checked content of ``tdkit.json``.

    Raises:
        CheckpointError: as in `load`.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        what = "does not exist" if not folder.exists() else f"holds no {DESCRIPTION}: it was not saved by tdkit"
        raise CheckpointError(f"{folder} {what}")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}: the copy is incomplete")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a tdkit description")
    version = description.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, this tdkit reads up to {FORMAT_VERSION}: update tdkit"
        )
    for key, kind in (("model", dict), ("layers", list), ("ties", dict), ("sha256", str)):
        if not isinstance(description.get(key), kind):
            raise CheckpointError(f"{path} is damaged: '{key}' is missing or malformed")
    return description


def _describe(matrix: FactorizedMatrix, users: list[FactorizedUser]) -> dict[str, Any]:
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


def _entries(model: nn.Module, values: Callable[[Tensor], Tensor]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns the tensors to write, tied ones once, and a map from each further name of a tied tensor to its first."""
    entries: dict[str, Entry] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = key.replace(COMPILED, "")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"cannot save '{name}': extra state of type {type(tensor).__name__} is not a tensor")
        where = id(tensor) if tensor.is_meta else tensor.data_ptr()
        place = (tensor.device, where, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            ties[name] = first[place]
            continue
        first[place] = name
        entries[name] = Entry(tensor.dtype, tuple(tensor.shape), partial(values, tensor))
    return entries, ties


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged or truncated: {error}") from None


@dataclass(frozen=True)
class _Layer:
    """A checked entry of a description: one factorised matrix and the layers that use it."""

    names: list[str]
    options: list[dict[str, Any]]
    shape: Shape
    decomposition: Decomposition
    error: float | None

    @classmethod
    def read(cls, entry: Any, place: str) -> _Layer:
        forms = {"names": list, "options": list, "shape": list, "decomposition": dict}
        if not isinstance(entry, dict):
            raise CheckpointError(f"{place}: {entry!r} is not a layer")
        for key, form in forms.items():
            if not isinstance(entry.get(key), form):
                raise CheckpointError(f"{place}: '{key}' is missing or malformed")
        names, options, shape, error = entry["names"], entry["options"], entry["shape"], entry.get("error")
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise CheckpointError(f"{place}: names={names!r} must be layer names")
        if len(options) != len(names) or not all(isinstance(option, dict) for option in options):
            raise CheckpointError(f"{place}: options={options!r} must be one set for each of {len(names)} names")
        if len(shape) < 2 or not all(type(size) is int and size > 0 for size in shape):
            raise CheckpointError(f"{place}: shape={shape!r} must be two sizes or more")
        if isinstance(error, bool) or not isinstance(error, int | float | None):
            raise CheckpointError(f"{place}: error={error!r} must be a number")
        try:
            kind = decomposition(entry["decomposition"])
            kind.empty(tuple(shape), device="meta")
        except TdkitError as problem:
            raise CheckpointError(f"{place}: {problem}") from None
        return cls(names, options, tuple(shape), kind, error)


class _Before:
    """The dense layers of a model by name; of those that change in place, shallow copies."""

    def __init__(self) -> None:
        self.layers: dict[str, nn.Module] = {}
        self._copies: dict[int, nn.Module] = {}  # by the id of a layer that changes in place
        self._originals: dict[int, nn.Module] = {}  # by the id of its copy

    def dense(self, module: nn.Module) -> nn.Module:
        return self._copies.get(id(module), module)

    def copied(self, module: nn.Module) -> nn.Module:
        """Returns the copy of a layer that is about to change in place."""
        if id(module) in self._originals:
            return module
        copied = self._copies[id(module)] = shallow_copy(module)
        self._originals[id(copied)] = module
        return copied

    def take(self, dense: nn.Module, layer: nn.Module) -> nn.Module:
        """Returns the module for the place of a dense layer: `layer`, or the original, which becomes it."""
        original = self._originals.get(id(dense))
        if original is None:
            return layer
        become(original, layer)
        return original

    def restore(self, model: nn.Module) -> None:
        for name, dense in reversed(self.layers.items()):
            replace_module(model, name, self.take(dense, dense))


def rewrite(model: nn.Module, layers: Sequence[Any], source: Path) -> None:
    """Put empty factors in the place of the weights of a dense model, on the devices of these.

    Args:
        layers: as in the description of a saved model.
        source: where they come from, for error messages.

    Raises:
        CheckpointError: when they are malformed or do not match `model`, which is then left half changed.
    """
    _rewrite(model, layers, source, _Before())


def _rewrite(model: nn.Module, layers: Sequence[Any], source: Path, before: _Before) -> None:
    matrices: dict[int, dict[str, FactorizedMatrix]] = {}  # by the id of the dense layer
    places = _places(model)
    folder = source.parent
    for number, entry in enumerate(layers):
        place = f"{source}: layer {number}"
        wanted = _Layer.read(entry, place)
        matrix: FactorizedMatrix | None = None
        built: dict[int, nn.Module] = {}  # one layer per module, also when it has several names
        for name, options in zip(wanted.names, wanted.options, strict=True):
            layer_name, attribute, dense = _find(model, name, places, before, folder)
            if id(dense) not in built:
                host, weight = _weight(dense, name, attribute, wanted, folder)
                if changes_in_place(host, layer_name):
                    dense = before.copied(dense)
                if matrix is None:
                    matrix = wanted.decomposition.empty(wanted.shape, device=weight.device, dtype=weight.dtype)
                    matrix.error = wanted.error
                own = matrices.setdefault(id(dense), {})
                own[attribute] = matrix
                try:
                    layer = install(dense, host.build(dense, own, options))
                except TypeError:
                    raise CheckpointError(f"{place}: {options!r} are no options of {name}") from None
                module = before.take(dense, layer)
                built[id(dense)] = built[id(module)] = module  # a shared block yields it again
            before.layers.setdefault(layer_name, dense)
            replace_module(model, layer_name, built[id(dense)])
    follow_ties(model)


def _places(model: nn.Module) -> dict[str, str]:
    """Returns the names of modules in the model by those in a file, which know no wrappers of ``torch.compile``."""
    names = (name for name, _ in model.named_modules(remove_duplicate=False) if COMPILED in f"{name}.")
    return {f"{name}.".replace(COMPILED, "").removesuffix("."): name for name in names}


def _with_wrappers(
    model: nn.Module, tensors: dict[str, Tensor], ties: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and ties by the names that the model gives its state."""
    places = _places(model)

    def named(entry: Any) -> Any:
        layer, dot, own = str(entry).rpartition(".")
        return f"{places[layer]}{dot}{own}" if layer in places else entry

    return {named(name): tensor for name, tensor in tensors.items()}, {named(a): named(b) for a, b in ties.items()}


def _find(
    model: nn.Module, name: str, places: Mapping[str, str], before: _Before, folder: Path
) -> tuple[str, str, nn.Module]:
    """Split a name made by `weight_name`: returns the layer name, the weight name and the dense layer."""
    layer, _, weight = name.rpartition(".")
    for named, attribute in ((name, "weight"), (layer, weight)):
        with suppress(AttributeError):
            place = places.get(named, named)
            module = before.dense(before.layers.get(place, model.get_submodule(place)))
            if attribute == "weight" or attribute in (*parameters_of(module), *parametrized(module)):
                return place, attribute, module
    raise CheckpointError(f"{folder}: this model has no layer {name}: it is another architecture") from None


def _weight(module: nn.Module, name: str, weight: str, wanted: _Layer, folder: Path) -> tuple[Host, Tensor]:
    """Returns the host of a dense layer and its weight, after a check of the shape against the file."""
    host = host_of(module)
    tensor = getattr(module, weight, None)
    if host is None or weight not in host.weights(module) or not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{folder}: layer {name} is a {type(module).__name__} in this model, not one that tdkit rewrites"
        )
    canonical = host.canonical(tensor, weight)
    shape = wanted.decomposition.shape_of(tuple(canonical.shape))
    if shape != wanted.shape:
        raise CheckpointError(f"{folder}: layer {name} is {by(wanted.shape)} in the file, {by(shape)} in this model")
    return host, canonical


def _checked_state(
    model: nn.Module, tensors: dict[str, Tensor], ties: Mapping[str, str], folder: Path
) -> dict[str, Tensor]:
    """Returns a tensor for every entry of the model's state, after a check of names and shapes; copies nothing."""
    state = dict(tensors)
    for repeated, original in ties.items():
        if not isinstance(original, str) or original not in tensors:
            raise CheckpointError(f"{folder / DESCRIPTION} ties {repeated} to {original}, which is not in {WEIGHTS}")
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
    holders: dict[int, str] = {}
    for name in shared:
        if own[name].is_meta:
            raise CheckpointError(f"{name} of the model given for {folder} is on the meta device: {BUILD_IT}")
        first = holders.setdefault(id(own[name]), name)
        if not torch.equal(state[first], state[name]):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} and {first} are one tensor in this model, two in the file: "
                "build the model without this tie (config.tie_word_embeddings=False in transformers)"
            )
    return state


def _fill(model: nn.Module, state: dict[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if state[name].dtype != tensor.dtype:
            _retype(model, name, state[name].dtype)
    model.load_state_dict(state)
    for name, dtype in dtypes.items():
        _retype(model, name, dtype)


def _rounded_buffers(model: nn.Module) -> dict[str, str]:
    """Returns the dtypes of non-persistent buffers, which a new model may create in another dtype."""
    saved = model.state_dict()
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point()
    }


def _buffer_dtypes(model: nn.Module, dtypes: Any, folder: Path) -> dict[str, torch.dtype]:
    """Returns the saved dtypes of `_rounded_buffers` that differ from those in the model, by buffer name."""
    own = dict(model.named_buffers())
    if not isinstance(dtypes, dict):
        raise CheckpointError(f"{folder / DESCRIPTION} is damaged: 'buffers' is malformed")
    found = {}
    for name, spelt in dtypes.items():
        dtype = getattr(torch, spelt, None) if isinstance(spelt, str) else None
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{folder / DESCRIPTION} is damaged: buffer {name} has no dtype {spelt!r}")
        if name in own and own[name].dtype != dtype:
            found[name] = dtype
    return found


def _retype(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Cast a parameter or buffer to `dtype`, so that loading does not round."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    tensor = getattr(owner, attribute)
    with torch.inference_mode(False):  # factors are never inference tensors, wherever load is called
        tensor.data = tensor.data.to(dtype)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give a folder")
    if any(folder.iterdir()):
        if not (folder / DESCRIPTION).is_file():
            raise CheckpointError(f"{folder} holds other files: give a new folder")
        if not overwrite:
            raise CheckpointError(f"{folder} holds a saved model: pass overwrite=True, or give a new folder")
