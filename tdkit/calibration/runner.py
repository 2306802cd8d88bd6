"""Runs a model on calibration batches, forward and backward, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.calibration import Batch, Calibration, Loss
from tdkit.calibration.losses import Labels, attention_mask, data_loss, sampled_loss
from tdkit.errors import CalibrationError


class Runner:
    """Runs a model on batches of whatever kind, forward and backward."""

    def __init__(self, model: nn.Module, *, gradients: bool, loss: Loss | None = None, labels: Labels = "data") -> None:
        self.model = model
        self.loss = loss
        self.labels = labels
        self.gradients = gradients

    def calibration(self, batches: list[Batch]) -> Calibration:
        """One without moments yet, that knows what they are of."""
        return Calibration({}, batches=batches, gradients=self.gradients, loss=self.loss, labels=self.labels)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

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
def as_it_was(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Eval mode and frozen parameters inside; modes, gradient switches, device and random state back after."""
    modes = [(module, module.training) for module in model.modules()]
    switches = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [home.index or 0] if home.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            model.requires_grad_(False)
            if device is not None:
                model.to(device)
            yield
        finally:
            if device is not None:
                model.to(home)
            for module, training in modes:
                module.training = training
            for parameter, switch in switches:
                parameter.requires_grad_(switch)
