"""Run a model on calibration batches, forward and backward, and restore its state afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdkit.calibration.batches import Batch, Call, call_of, check_decoder_inputs, decoder_lengths, moved
from tdkit.calibration.calibration import Calibration, Loss
from tdkit.calibration.causality import is_causal
from tdkit.calibration.losses import Labels, data_loss, sampled_loss
from tdkit.errors import CalibrationError
from tdkit.sources.positions import check_positions
from tdkit.support.compatibility import buffers_of, move_own_tensors, parameters_of

T = TypeVar("T")


class Runner:
    """Runs a model forward and backward on batches; `call_of` says what a batch can be.

    Args:
        device: where the batches go; when None, to the device of the model.

    Attributes:
        causal: whether the model is a causal language model; False until `find_causality` has found that it is.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gradients: bool,
        loss: Loss | None = None,
        labels: Labels = "data",
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self._device = device
        self.loss = loss
        self.labels = labels
        self.gradients = gradients
        self.causal = False

    def calibration(self, batches: list[Batch]) -> Calibration:
        """Returns an empty calibration with the batches, loss and labels of this runner."""
        return Calibration({}, batches=batches, gradients=self.gradients, loss=self.loss, labels=self.labels)

    @property
    def device(self) -> torch.device:
        return device_of(self.model) if self._device is None else self._device

    def call(self, batch: Batch) -> Call:
        """Returns the batch, divided, on the device of the model."""
        return call_of(self.model, moved(batch, self.device))

    def check_batches(self, batches: Sequence[Batch]) -> None:
        """Check, without running the model, that it takes the batches.

        Raises:
            CalibrationError: when it does not take one of them; the message has its number.
            SourceError: when a batch has more tokens than the model has positions.
        """
        for number, batch in enumerate(batches):
            try:
                call = call_of(self.model, batch)
                check_decoder_inputs(self.model, call)
            except CalibrationError as error:
                raise CalibrationError(f"calibration batch {number}: {error}") from None
            if call.token_ids is not None and call.is_text:  # a table of positions can be that of another input
                check_positions(self.model, call.token_ids.shape[1])

    def find_causality(self, batches: Sequence[Batch]) -> None:
        """Run the model on the first batch without labels to find whether the next tokens can be the labels.

        Nothing is run when no default loss needs to know.
        """
        if not self.gradients or self.loss is not None:
            return
        first = next((batch for batch in batches if call_of(self.model, batch).labels is None), None)
        if first is not None:
            self.causal = is_causal(lambda call: call.run(self.model), self.call(first))

    def forward(self, batch: Batch) -> Any:
        return self.call(batch).run(self.model)

    def backward(self, output: Any, batch: Batch, number: int) -> None:
        try:
            value = self._loss(output, batch, number)
        except CalibrationError as error:
            raise CalibrationError(f"calibration batch {number}: {error}") from None
        if not isinstance(value, Tensor):
            raise CalibrationError(f"the loss function returned a {type(value).__name__}, not a scalar tensor")
        if value.ndim or not bool(torch.isfinite(value)):
            raise CalibrationError(
                f"the loss of calibration batch {number} is {value.tolist()!r}: it must be one finite number"
            )
        if not value.requires_grad:
            raise CalibrationError("the loss does not depend on any layer's output: check the loss function")
        value.backward()  # type: ignore[no-untyped-call]

    def _loss(self, output: Any, batch: Batch, number: int) -> Tensor:
        if self.loss is not None:
            return self.loss(output, moved(batch, self.device))
        call = self.call(batch)
        if self.labels == "data":
            sums = getattr(getattr(self.model, "config", None), "ctc_loss_reduction", None) == "sum"
            return data_loss(output, call, causal=self.causal, sums_sequences=sums)
        return sampled_loss(output, call, seed=number, causal=self.causal)

    def mask(self, batch: Batch) -> Tensor | None:
        """Returns the attention mask (n, tokens) of a batch on the device of the model, or None.

        None too when the decoder of an encoder-decoder has as many tokens: the mask would be taken for its mask.
        """
        call = call_of(self.model, batch)
        ambiguous = call.mask is not None and call.mask.shape[1] in decoder_lengths(self.model, call)
        return None if call.mask is None or ambiguous else call.mask.to(self.device)


@contextmanager
def as_it_was(model: nn.Module, device: torch.device | str | None, *, freeze: bool = True) -> Iterator[None]:
    """A context manager that sets eval mode and restores modes, `requires_grad`, devices and random state on exit.

    A layer that replaced another inside the block gets the mode and the device of the layer it replaced.

    Args:
        device: the device of the model inside the block; when None the model is not moved, nor one with layers that
            hooks of accelerate load when they are called.
        freeze: set ``requires_grad=False`` on all parameters inside the block.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        device = None
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    frozen = [p for p in model.parameters() if freeze and p.requires_grad and not p.is_inference()]
    homes = {} if device is None else _homes(model)
    inside = [] if device is None else [torch.device(device)]
    on_cuda = {home for home in (*homes.values(), device_of(model), *inside) if home.type == "cuda"}
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


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the first parameter; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _homes(model: nn.Module) -> dict[str, torch.device]:
    """Returns the device of each module that owns tensors, by module name, and under ``""`` that of the model."""
    homes = {"": device_of(model)}
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
