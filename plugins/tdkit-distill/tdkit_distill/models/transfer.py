"""Copy the weights of a saved student into another one, layer by layer, and say which layers were left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tdkit.decompositions import FactorizedMatrix
from torch import Tensor, nn

from tdkit_distill.errors import StageError

SHOWN = 12  # names in one line for people; an error lists all


@dataclass(frozen=True)
class Transfer:
    """What `take_weights` did, as names of layers.

    Attributes:
        taken: their parameters and buffers were copied.
        missing: only the student has them, or its head has another shape; they are as they were.
        unused: only the source has them.
    """

    taken: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def lines(self, source: str) -> list[str]:
        """One line for people about each kind of layer that there is."""
        found = [f"start: {len(self.taken)} layers taken from {source}"]
        if self.missing:
            found.append(f"not in {source}, or of another shape there, and left as they are: {_some(self.missing)}")
        if self.unused:
            found.append(f"in {source} only, and not taken: {_some(self.unused)}")
        return found


@torch.no_grad()
def take_weights(model: nn.Module, source: nn.Module, place: str) -> Transfer:
    """Copy into `model` the parameters and persistent buffers of every layer that `source` has under the same name.

    A layer is a module with tensors of its own; a factorised layer together with its factors, bias and orders is
    one. A layer that only one of the two models has is left out, and so is a dense layer outside a transformers
    base model whose shape differs (a classifier of another number of classes). Everything is checked before the
    first tensor is written.

    Args:
        place: names the source in errors.

    Raises:
        StageError: when layers of the same name differ in their factors, buffers or shapes, with all of them;
            when parameters that `model` ties differ in `source`; when no layer has the same name.
    """
    mine, theirs = _layers(model), _layers(source)
    faults: list[str] = []
    taken, reshaped = [], set()
    for name in mine.keys() & theirs.keys():
        differ = _differences(name, mine[name], theirs[name])
        if not differ:
            taken.append(name)
        elif _is_head(model, name) and not (_is_factorized(model, name) or _is_factorized(source, name)):
            reshaped.add(name)
        else:
            faults += differ
    taken = [name for name in mine if name in set(taken)]
    pairs = {f"{name}.{part}": (mine[name][part], theirs[name][part]) for name in taken for part in mine[name]}
    faults += _broken_ties(pairs)
    if faults:
        raise StageError(
            f"start: {place} does not fit this student:\n"
            + "\n".join(sorted(faults))
            + f"\nCompress this student by the rules, ranks and factor shapes that {place} was compressed by, or drop "
            "start"
        )
    if not taken:
        raise StageError(
            f"start: {place} has no layer in common with this student: it has {_some(theirs)}, and the student "
            f"{_some(mine)}. Give a folder that was saved from the same architecture"
        )
    for target, value in pairs.values():
        target.copy_(value)
    return Transfer(
        tuple(taken),
        tuple(name for name in mine if name not in theirs or name in reshaped),
        tuple(name for name in theirs if name not in mine),
    )


def _layers(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Parameters and persistent buffers by layer and by name inside it, tied ones under each of their names."""
    factorized = {
        name.rpartition(".")[0]
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FactorizedMatrix)
    }
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = name.rpartition(".")[0]
        layer = next((parent for parent in _with_parents(owner) if parent in factorized), owner)
        if isinstance(tensor, Tensor):
            found[layer][name.removeprefix(f"{layer}.")] = tensor
    return dict(found)


def _with_parents(name: str) -> Iterable[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _differences(layer: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    def shape(tensors: Mapping[str, Tensor], part: str) -> str:
        return str(tuple(tensors[part].shape)) if part in tensors else "missing"

    return [
        f"{layer}.{part}: {shape(theirs, part)} there, {shape(mine, part)} here"
        for part in sorted(mine.keys() | theirs.keys())
        if shape(mine, part) != shape(theirs, part)
    ]


def _broken_ties(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Names under which the student has one tensor and the source has several."""
    first: dict[int, str] = {}
    faults = []
    for name, (target, value) in pairs.items():
        known = first.setdefault(id(target), name)
        if not torch.equal(pairs[known][1], value):
            faults.append(f"{known} and {name}: two tensors there, one that is tied here")
    return faults


def _is_head(model: nn.Module, name: str) -> bool:
    base: Any = getattr(model, "base_model_prefix", "")
    return bool(base) and hasattr(model, base) and not name.startswith(f"{base}.")


def _is_factorized(model: nn.Module, name: str) -> bool:
    return any(isinstance(child, FactorizedMatrix) for child in model.get_submodule(name).children())


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(name or "(top)" for name in every[:SHOWN]) + more
