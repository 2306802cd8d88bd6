"""Checkpoints of a run, in safetensors and JSON, written whole or not at all; reading one unpickles nothing.

A checkpoint holds the student with its learned projections, the optimizer's moments, the loss scaler, and
where the run stands (stage, step). The order of the data, the learning rate and every random draw are pure
functions of the seed, the stage and the step, so that these numbers are their state.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tdkit.errors import reason_of
from tdkit.support.documents import read_json
from tdkit.support.files import digest_of_file, whole_folder
from torch import Tensor, nn

from tdkit_distill.errors import ResumeError, StorageError
from tdkit_distill.models.sharding import gathered, named_tensors, put

FORMAT = 2  # 1 had no digest of its state
STATE = "state.json"
TENSORS = ("model", "optimizer")
SEPARATOR = "|"  # between a parameter's name and its optimizer entry; no module name can hold it in this place


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        stage: its number, from 0.
        step: optimizer steps that this stage has done.
        total: steps that all stages have done.
        tokens: positions that all stages have trained on.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and verified."""

    folder: Path
    position: Position
    run: str
    scaler: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def write_checkpoint(
    folder: Path,
    position: Position,
    *,
    run: str,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    scaler: Mapping[str, Any],
    keep: int,
) -> None:
    """Write a checkpoint below `folder`, then drop all but the last `keep`.

    Args:
        run: identifies the run by its models, data and stages; only a run with the same value is resumed.

    Raises:
        StorageError: when it could not be written; earlier checkpoints are untouched.
    """
    groups = {"model": dict(model), "optimizer": dict(optimizer)}
    _write(folder / f"step-{position.total:08d}", position, run, groups, dict(scaler))
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    _drop_unneeded_bests(folder)


def write_best(folder: Path, position: Position, *, run: str, model: Mapping[str, Tensor]) -> None:
    """Write the best weights of a stage so far; earlier ones stay while a checkpoint from before this one is there.

    Raises:
        StorageError: as `write_checkpoint`.
    """
    _write(_best_place(folder, position.stage, position.total), position, run, {"model": dict(model), "optimizer": {}})


def read_best(folder: Path, stage: int, total: int) -> dict[str, Tensor]:
    """The weights that `write_best` wrote after `total` steps in a stage.

    Raises:
        ResumeError: when they are missing or damaged.
    """
    place = _best_place(folder, stage, total)
    try:
        return _read(place).model
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ResumeError(
            f"the best weights in {place} cannot be read ({error}): delete {folder} to start again"
        ) from (error)


def _best_place(folder: Path, stage: int, total: int) -> Path:
    return folder / f"best-{stage:02d}-{total:08d}"


def _drop_unneeded_bests(folder: Path) -> None:
    """Keep, for each checkpoint, the last best weights of its stage that were known when it was written."""
    bests = sorted(place for place in folder.glob("best-*") if place.is_dir())
    needed: set[Path] = set()
    for checkpoint in checkpoints(folder):
        try:
            position = Position(**json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["position"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one, which no run goes on from
        first, last = (_best_place(folder, position.stage, total) for total in (0, position.total))
        needed |= set([place for place in bests if first <= place <= last][-1:])
    for place in bests:
        if place not in needed:
            shutil.rmtree(place, ignore_errors=True)


def _write(
    place: Path,
    position: Position,
    run: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    scaler: Mapping[str, Any] | None = None,
) -> None:
    size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    try:
        with whole_folder(place) as target:
            digests = {}
            for name, group in tensors.items():
                save_file(dict(group), target / f"{name}.safetensors")
                digests[name] = digest_of_file(target / f"{name}.safetensors")
            state: dict[str, Any] = {
                "format": FORMAT,
                "run": run,
                "position": vars(position),
                "scaler": dict(scaler or {}),
                "digests": digests,
            }
            state["digest"] = _digest_of(state)
            (target / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        last = next(iter(reversed(checkpoints(place.parent))), None)
        kept = f"the last good one is {last}" if last else "there is no earlier one"
        raise StorageError(
            f"checkpoint {place} ({size / 1e6:,.0f} MB) could not be written: {error}. Free some space and run "
            f"again to go on; {kept}"
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    return sorted(place for place in folder.glob("step-*") if place.is_dir()) if folder.is_dir() else []


def read_latest(folder: Path, run: str) -> Saved | None:
    """The newest checkpoint that is whole; None when there is none at all.

    Raises:
        ResumeError: when it is of another run, or every one is damaged.
    """
    found = checkpoints(folder)
    problems = []
    for place in reversed(found):
        try:
            saved = _read(place)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            problems.append(f"{place.name}: {reason_of(error)}")
            continue
        if saved.run != run:
            raise ResumeError(
                f"{folder} holds a run with other models, data or stages: give another folder, or delete it"
            )
        return saved
    if found:
        raise ResumeError(f"every checkpoint in {folder} is damaged ({'; '.join(problems)}): delete it to start again")
    return None


def _read(place: Path) -> Saved:
    state = read_json(place / STATE)
    version = state["format"]
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ResumeError(f"{place} has format {version!r}; this tdkit-distill reads up to {FORMAT}")
    if version > 1 and state.pop("digest") != _digest_of(state):
        raise ValueError(f"{STATE} is damaged")
    position = Position(**state["position"])
    if any(type(count) is not int or count < 0 for count in vars(position).values()):
        raise ValueError(f"{STATE} is damaged: {position} are no counts")
    if not isinstance(state["run"], str) or not isinstance(state["scaler"], dict):
        raise ValueError(f"{STATE} is damaged")
    tensors = {}
    for name in TENSORS:
        path = place / f"{name}.safetensors"
        if digest_of_file(path) != state["digests"][name]:
            raise ValueError(f"{path.name} is damaged")
        tensors[name] = load_file(path)
    return Saved(place, position, state["run"], state["scaler"], **tensors)


def _digest_of(state: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a state, without its own digest."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def model_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once, whole, on the CPU.

    Args:
        keep: False takes part in gathering the shards of others and returns nothing.
    """
    return _kept(named_tensors(model), keep)


def trained_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """As `model_tensors`, without the parameters that are not trained."""
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return _kept({name: tensor for name, tensor in named_tensors(model).items() if name not in fixed}, keep)


def put_back(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy some of a model's parameters and buffers into it, by name."""
    named = named_tensors(model)
    for name, tensor in tensors.items():
        put(tensor, named[name])


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved parameters and buffers into a model, which must have the same names."""
    named = named_tensors(model)
    if set(named) != set(tensors):
        odd = sorted(set(named) ^ set(tensors))[:3]
        raise ResumeError(f"the checkpoint and the model differ in {', '.join(odd)}")
    for name, tensor in named.items():
        if tensors[name].shape != tensor.shape or tensors[name].is_floating_point() != tensor.is_floating_point():
            raise ResumeError(
                f"the checkpoint holds {name} as {tuple(tensors[name].shape)} {tensors[name].dtype}, the model as "
                f"{tuple(tensor.shape)} {tensor.dtype}: give another folder, or delete it"
            )
    for name, tensor in named.items():
        put(tensors[name], tensor)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; `keep` as for `model_tensors`."""
    found = {
        f"{name}{SEPARATOR}{entry}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }
    return _kept(found, keep)


def _kept(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        whole = gathered(tensor)
        if keep:
            found[name] = whole.detach().cpu().contiguous().clone()
    return found


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load into the optimizer the state that `optimizer_tensors` returned."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, entry = key.partition(SEPARATOR)
        parameter = parameters.get(name)
        shape = None if parameter is None else torch.Size() if entry == "step" else parameter.shape
        if parameter is None or value.shape != shape or not value.is_floating_point():
            raise ResumeError(
                f"the checkpoint holds {key} as {tuple(value.shape)} {value.dtype}, which is no state of this "
                "optimizer: give another folder, or delete it"
            )
        if entry != "step":
            moment = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
            put(value, moment)
            value = moment
        optimizer.state[parameter][entry] = value
