"""The teacher as a live model, run in inference mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tdkit_distill.models.calls import Call, call_model, logits_of
from tdkit_distill.models.sharding import replica
from tdkit_distill.models.taps import AttentionRecord, tapped
from tdkit_distill.models.view import View


class Teacher(Protocol):
    """The interface of a teacher."""

    def view(self, batch: Mapping[str, Tensor], rows: Tensor) -> View:
        """What the teacher returns for a batch, whose rows have these numbers."""


class Called(nn.Module):
    """A model together with the function that calls it, as one module, so that FSDP's hooks see every call."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        return self._call(self.model, batch)


class LiveTeacher:
    """A model in eval and inference mode, with taps. Made by `live_teacher`."""

    def __init__(
        self,
        model: Called,
        record: Any,
        mode: Callable[[], Any],
        at: torch.device,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self._model = model
        self._record = record
        self._mode = mode
        self._at = at
        self._device = device
        self._dtype = dtype

    def view(self, batch: Mapping[str, Tensor], rows: Tensor) -> View:
        """What the teacher returns. The logits are inference tensors: clone them before autograd saves them."""
        with self._mode():
            output = self._model({name: self._given(value) for name, value in batch.items()})
        logits = logits_of(output)
        view = View(
            None if logits is None else logits.to(self._device),
            {name: self._out(x) for name, x in self._record.outputs.items()},
            {
                name: AttentionRecord(
                    self._out(r.scores), None if r.allowed is None else self._out(r.allowed), r.are_probabilities
                )
                for name, r in self._record.attention.items()
            },
        )
        self._record.clear()
        return view

    def _given(self, x: Tensor) -> Tensor:
        """An input on the model's device, and in its dtype if it has been given another one."""
        return x.to(self._at, self._dtype if x.is_floating_point() else None)

    def _out(self, x: Tensor) -> Tensor:
        """A copy on the student's device that autograd may save, unlike a tensor made in inference mode."""
        return x.to(self._device, copy=True)


@contextmanager
def live_teacher(
    model: nn.Module,
    *,
    outputs: Iterable[str] = (),
    attention: Iterable[str] = (),
    dtype: torch.dtype | None = None,
    at: torch.device | str | None = None,
    device: torch.device | None = None,
    call: Call = call_model,
    cut: Callable[[nn.Module, nn.Module], None] | None = None,
) -> Iterator[LiveTeacher]:
    """Make a model a teacher while the context is open; it is restored afterwards.

    Args:
        model: copied when another dtype or device is asked for, otherwise used in place.
        outputs, attention: names of modules to tap.
        dtype, at: of the teacher's own forward.
        device: where the views go; the teacher's own when None.
        call: how to run a model on a batch.
        cut: ``(root, model)``, shards a copy of the model over all processes, at `at`.
    """
    parameter = next(model.parameters())
    here = parameter.device
    place = here if at is None else torch.device(at)
    if place.type == here.type and place.index in (None, here.index):  # accelerate says cuda where torch says cuda:0
        place = here
    if cut is not None:
        used = replica(model).to(dtype=dtype)
    elif place != here or dtype not in (None, parameter.dtype):
        used = copy.deepcopy(model).to(device=place, dtype=dtype)
    else:
        used = model
    modes = {module: module.training for module in used.modules()}
    root = Called(used, call)
    used.eval()
    try:
        with tapped(used, outputs, attention) as record:
            if cut is not None:
                cut(root, used)
            # what shards gather inside inference mode could not be written again outside it
            mode = torch.inference_mode if cut is None else torch.no_grad
            yield LiveTeacher(root, record, mode, place, device or place, dtype)
    finally:
        for module, training in modes.items():
            module.training = training
