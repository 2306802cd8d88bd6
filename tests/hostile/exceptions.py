"""Raise an exception at a call inside tdkit, any one, while a model is compressed, quantized or loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import tdkit

ROOT = str(Path(tdkit.__file__).parent)


class InjectedError(Exception):
    """An exception that no code expects."""


@dataclass(frozen=True)
class State:
    """All that a caller could see of a model."""

    modules: dict[str, int]
    classes: dict[str, type]
    tensors: dict[str, Tensor]
    dtypes: dict[str, tuple[torch.dtype, torch.device]]
    known: dict[str, str]
    training: bool

    @classmethod
    def of(cls, model: nn.Module) -> State:
        modules = dict(model.named_modules(remove_duplicate=False))
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        names = ("_tied_weights_keys", "all_tied_weights_keys", "hf_quantizer", "config")
        return cls(
            {name: id(module) for name, module in modules.items()},
            {name: type(module) for name, module in modules.items()},
            {name: tensor.detach().clone() for name, tensor in state.items()},
            {name: (tensor.dtype, tensor.device) for name, tensor in state.items()},
            {f"{at}.{name}": _told(vars(module).get(name)) for at, module in modules.items() for name in names},
            model.training,
        )

    def differs(self, other: State, *, identity: bool = True) -> str | None:
        """Returns in what another state differs, or None; without `identity`, modules may be other objects."""
        if identity and self.modules != other.modules:
            return "modules"
        if self.classes != other.classes:
            return "classes of modules"
        if self.tensors.keys() != other.tensors.keys() or self.dtypes != other.dtypes:
            return "names, dtypes or devices of tensors"
        if self.known != other.known:
            return "ties or config"
        for name, tensor in self.tensors.items():
            if not torch.equal(tensor, other.tensors[name]):
                return f"the numbers of {name}"
        return None if self.training == other.training else "the mode"


def _told(value: object) -> str:
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else str(value)


def calls_in(work: Callable[[], object]) -> list[str]:
    """Returns the functions of tdkit that `work` calls, in order."""
    seen: list[str] = []

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            seen.append(f"{frame.f_code.co_filename[len(ROOT) + 1 :]}:{frame.f_code.co_name}")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


def raised_at(number: int, kind: type[BaseException], work: Callable[[], object]) -> BaseException | None:
    """Run `work` with an exception at its call `number`; returns what came out of it, or None."""
    seen = -1

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal seen
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            seen += 1
            if seen == number:
                sys.setprofile(None)
                raise kind

    sys.setprofile(count)
    try:
        work()
    except BaseException as error:
        return error
    finally:
        sys.setprofile(None)
    return None


def tried(
    number: int,
    kind: type[BaseException],
    make: Callable[[], Any],
    work: Callable[[Any], object],
    whole: State,
    *,
    same: bool,
) -> str | None:
    """Interrupt `work(make())` at one call; returns what is wrong with the model afterwards, or None.

    It must be as it was, or, where the exception comes after the last change, the finished one. The layers must be the
    `same` objects, unless their weights were set aside on disk and nobody else held them.
    """
    model = make()
    before = State.of(model)
    error = raised_at(number, kind, lambda: work(model))
    after = State.of(model)
    if error is None:  # caught, as where an optional thing is tried
        return after.differs(whole, identity=False)
    changed = after.differs(before, identity=same)
    return changed if changed and after.differs(whole, identity=False) else None
