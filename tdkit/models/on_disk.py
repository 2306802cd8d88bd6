"""A model whose parameters lie in files and are brought into memory layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import CheckpointError
from tdkit.models.hosts.in_place import parametrized
from tdkit.models.shards import Shards, same_bits
from tdkit.models.sites import User
from tdkit.support.compatibility import buffers_of, parameters_of

Place = tuple[nn.Module, str]  # a module and the name of one of its own parameters


class OnDisk:
    """The parameters of a model on the meta device, which lie in `shards`.

    Args:
        model: a model whose parameters are on the meta device and whose buffers are not. Its persistent buffers are
            read at once.
        shards: the tensors of its state. Tied parameters need one of their names.
        names: the name in the model of each tensor in the files; when None, they have the names of the model's state.

    Attributes:
        held_bytes: bytes of the parameters in memory now.
        peak_bytes: the most that they were.
        device: where they are brought to.

    Raises:
        CheckpointError: when names or shapes are not those of the model.
    """

    def __init__(self, model: nn.Module, shards: Shards, names: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.shards = shards
        self.held_bytes = 0
        self.peak_bytes = 0
        self.device = torch.device("cpu")
        self._parameters = dict(model.named_parameters(remove_duplicate=False))  # kept, so that ids stay theirs
        self._files = self._matched({name: name for name in shards.tensors} if names is None else names)

    @property
    def folder(self) -> Path:
        """The folder of the files, for messages."""
        return self.shards.files[0].parent

    def name_of(self, parameter: Tensor) -> str:
        """Returns the name of a parameter of the model in the files."""
        return self._files[id(parameter)]

    def holds(self, parameter: Tensor) -> bool:
        """Returns whether a tensor is one of the model's parameters in the files."""
        return id(parameter) in self._files

    def read(self, parameter: Tensor) -> Tensor:
        """Returns the values of a parameter of the model, in its dtype, on the CPU."""
        return self.shards.read(self.name_of(parameter), parameter.dtype)

    def move_to(self, device: torch.device) -> None:
        """Bring parameters to `device` from now on, and move the buffers there."""
        self.device = device
        for module in self.model.modules():
            buffers = buffers_of(module)
            for name, buffer in buffers.items():
                buffers[name] = None if buffer is None else buffer.to(device)

    def weight(self, user: User) -> Tensor:
        """Returns the weight of a layer as a view (out, in) or (out, in, *kernel) of a new tensor."""
        with self.holding(user):
            return user.tensor.detach()

    @contextmanager
    def holding(self, *users: User) -> Iterator[None]:
        """A context manager inside which the weights of some layers are in memory."""
        places: list[Place] = []
        for user in users:
            module = user.module
            if user.weight in parametrized(module):
                parts = module.get_submodule(f"parametrizations.{user.weight}")
                places += [(part, name) for part in parts.modules() for name in parameters_of(part)]
            else:
                places.append((module, user.weight))
        with self._filled(places):
            yield

    @contextmanager
    def brought(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """A context manager inside which the own parameters of `modules`, without their children's, are in memory."""
        with self._filled([(module, name) for module in modules for name in parameters_of(module)]):
            yield

    @contextmanager
    def _filled(self, places: list[Place]) -> Iterator[None]:
        empty = [(module, name, parameters_of(module)[name]) for module, name in places]
        empty = [(module, name, parameter) for module, name, parameter in empty if self._is_away(parameter)]
        real: dict[int, nn.Parameter] = {}
        size = 0
        try:
            for module, name, parameter in empty:
                if id(parameter) not in real:
                    held = self.read(parameter).to(self.device)
                    size += held.nbytes
                    self.held_bytes += held.nbytes
                    self.peak_bytes = max(self.peak_bytes, self.held_bytes)
                    real[id(parameter)] = nn.Parameter(held, parameter.requires_grad)
                setattr(module, name, real[id(parameter)])  # recurrent layers keep a list of theirs
            yield
        finally:
            for module, name, parameter in empty:
                setattr(module, name, parameter)
            self.held_bytes -= size

    def _is_away(self, parameter: nn.Parameter | None) -> bool:
        return parameter is not None and parameter.is_meta

    def _matched(self, names: Mapping[str, str]) -> dict[int, str]:
        """Returns the name in the files of each parameter, by its id, and reads the buffers."""
        known = self.shards.tensors
        file_names = {own: name for name, own in names.items()}
        state = self.model.state_dict(keep_vars=True)
        files: dict[int, str] = {}
        used: set[str] = set()
        ties: dict[int, list[str]] = {}
        for name, tensor in state.items():
            found = file_names.get(name)
            if found is not None:
                used.add(found)
                files.setdefault(id(tensor), found)
                ties.setdefault(id(tensor), []).append(found)
        problems = [f"lack {name}" for name, tensor in state.items() if id(tensor) not in files]
        ignored = [re.compile(pattern) for pattern in _ignored(self.model)]
        problems += [
            f"have {name}, which the model lacks"
            for name in known
            if name not in used and not any(pattern.search(name) for pattern in ignored)
        ]
        problems += [
            f"hold {files[id(tensor)]} as {known[files[id(tensor)]].shape}, the model as {tuple(tensor.shape)}"
            for tensor in state.values()
            if id(tensor) in files and known[files[id(tensor)]].shape != tuple(tensor.shape)
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"the files in {self.folder} {'; '.join(problems[:5])}{more}. Weights that are merged or "
                "computed when a model is loaded cannot be read one by one: load the model and compress it in memory"
            )
        for tied in ties.values():
            self._check_tie(tied)
        with torch.no_grad():
            for tensor in state.values():
                if not isinstance(tensor, nn.Parameter):
                    tensor.copy_(self.shards.read(files[id(tensor)]))
        return files

    def _check_tie(self, names: list[str]) -> None:
        for other in names[1:]:
            if not same_bits(self.shards.read(names[0]), self.shards.read(other)):
                raise CheckpointError(
                    f"{names[0]} and {other} are one tensor in this model, two in the files of {self.folder}: "
                    "set tie_word_embeddings to false in its config.json"
                )


def _ignored(model: nn.Module) -> list[str]:
    """Returns the patterns of names in files that transformers leaves out on purpose, such as old buffers."""
    found: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    return [pattern for pattern in found or () if isinstance(pattern, str)]
