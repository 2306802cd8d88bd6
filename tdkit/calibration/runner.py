"""Run a model on calibration batches, forward and backward, and restore its state afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdkit.calibration.calibration import Batch, Calibration, Loss
from tdkit.calibration.losses import Labels, attention_mask, data_loss, sampled_loss
from tdkit.errors import CalibrationError
from tdkit.support.compatibility import buffers_of, move_own_tensors, parameters_of

T = TypeVar("T")


class Runner:
    """Runs a model forward and backward on batches that are tensors, tuples or mappings."""

    def __init__(self, model: nn.Module, *, gradients: bool, loss: Loss | None = None, labels: Labels = "data") -> None:
        self.model = model
        self.loss = loss
        self.labels = labels
        self.gradients = gradients

    def calibration(self, batches: list[Batch]) -> Calibration:
        """Returns an empty calibration with the batches, loss and labels of this runner."""
        return Calibration({}, batches=batches, gradients=self.gradients, loss=self.loss, labels=self.labels)

    @property
    def device(self) -> torch.device:
        return _device_of(self.model)

    def forward(self, batch: Batch) -> Any:
        batch = self._moved(batch)
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, tuple | list) else self.model(batch)

    def backward(self, output: Any, batch: Batch, number: int) -> None:
        batch = self._moved(batch)
        value = self._loss(output, batch, number)
        if value.ndim or not bool(torch.isfinite(value)):
            raise CalibrationError(
                f"the loss of calibration batch {number} is {value.tolist()!r}: it must be one finite number"
            )
        if not value.requires_grad:
            raise CalibrationError("the loss does not depend on any layer's output: check the loss function")
        value.backward()  # type: ignore[no-untyped-call]

    def _loss(self, output: Any, batch: Batch, number: int) -> Tensor:
        if self.loss is not None:
            return self.loss(output, batch)
        return data_loss(output, batch) if self.labels == "data" else sampled_loss(output, batch, seed=number)

    def mask(self, batch: Batch) -> Tensor | None:
        mask = attention_mask(batch)
        return None if mask is None else mask.to(self.device)

    def _moved(self, batch: Batch) -> Batch:
        if isinstance(batch, Tensor):
            return batch.to(self.device)
        if isinstance(batch, Mapping):
            return {key: self._moved(value) for key, value in batch.items()}
        return tuple(self._moved(value) for value in batch) if isinstance(batch, tuple | list) else batch


@contextmanager
def as_it_was(model: nn.Module, device: torch.device | str | None, *, freeze: bool = True) -> Iterator[None]:
    """A context manager that sets eval mode and restores modes, `requires_grad`, devices and random state on exit.

    A layer that replaced another inside the block gets the mode and the device of the layer it replaced.

    Args:
        device: the device of the model inside the block; when None the model is not moved.
        freeze: set ``requires_grad=False`` on all parameters inside the block.
    """
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    frozen = [p for p in model.parameters() if freeze and p.requires_grad and not p.is_inference()]
    homes = {} if device is None else _homes(model)
    on_cuda = {home for home in (*homes.values(), _device_of(model)) if home.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(home.index or 0 for home in on_cuda)):
        try:
            model.eval()
            for parameter in frozen:
                parameter.requires_grad_(False)
            if device is not None:
                model.to(device)
            yield
        finally:
            if device is not None:
                _bring_home(model, homes)
            for name, module in model.named_modules(remove_duplicate=False):
                module.training = _of_nearest(name, modes)
            for parameter in frozen:
                parameter.requires_grad_(True)


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _homes(model: nn.Module) -> dict[str, torch.device]:
    """Returns the device of each module that owns tensors, by module name, and under ``""`` that of the model."""
    homes = {"": _device_of(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        own = next((t for t in (*parameters_of(module).values(), *buffers_of(module).values()) if t is not None), None)
        if own is not None:
            homes[name] = own.device
    return homes


def _bring_home(model: nn.Module, homes: Mapping[str, torch.device]) -> None:
    if len(set(homes.values())) == 1:
        model.to(homes[""])
        return
    for name, module in model.named_modules(remove_duplicate=False):
        home = _of_nearest(name, homes)
        move_own_tensors(module, home)


def _of_nearest(name: str, known: Mapping[str, T]) -> T:
    """Returns the entry of a module or of its nearest parent in `known`; the root module is called ``""``."""
    while name not in known:
        name = name.rpartition(".")[0]
    return known[name]
