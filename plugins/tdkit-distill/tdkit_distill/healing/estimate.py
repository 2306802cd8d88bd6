"""What healing will take: time from timed steps, memory and disk from sizes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tdkit.calibration.outputs import predictions
from torch import Tensor, nn

from tdkit_distill.data.examples import Examples
from tdkit_distill.models.calls import call_model, logits_of, to_device

Precision = Literal["no", "bf16"]


@dataclass(frozen=True)
class Speed:
    """Of one model: seconds per token of a forward, and of a forward with backward, and bytes kept between them."""

    forward: float
    step: float
    activations: int


@dataclass(frozen=True)
class Estimate:
    """What healing takes.

    Attributes:
        tokens, steps: of training.
        steps_done: by an earlier run that this one goes on with.
        trained, params: parameters that are trained, and all.
        seconds: of what is left of training and measurements, and of the teacher's logits.
        tokens_per_second: of training alone.
        memory: bytes of weights, gradients, moments and activations.
        disk: bytes in the run's folder at most; 0 without one.
        precision: of the forward.
    """

    tokens: int
    steps: int
    steps_done: int
    trained: int
    params: int
    seconds: float
    tokens_per_second: float
    memory: int
    disk: int
    precision: Precision

    def text(self) -> str:
        """One paragraph."""
        disk = f", {self.disk / 1e9:.2g} GB of disk" if self.disk else ""
        done = f" ({self.steps_done:,} done)" if self.steps_done else ""
        where = " in bfloat16" if self.precision == "bf16" else ""
        return (
            f"{self.tokens:,} tokens in {self.steps:,} steps{done}, {self.trained:,} of {self.params:,} parameters "
            f"trained{where}: about {duration(self.seconds)} at "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.memory / 1e9:.2g} GB of memory{disk}"
        )


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def speed_of(
    model: nn.Module, rows: Examples, count: int, trained: set[str], precision: Precision, device: torch.device
) -> Speed:
    """Time the second of two steps on `count` rows.

    The weights stay as they are, and no gradient is left.

    Args:
        trained: names of the parameters that get gradients; with none of them only a forward is timed.
    """
    numbers = torch.arange(min(count, len(rows)))
    batch = to_device(rows.batch(numbers, torch.Generator().manual_seed(0)), device)
    tokens = len(numbers) * rows.length
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model.eval()  # batch normalisation learns nothing from this
    try:
        for _ in range(2):
            kept = _Kept(model)
            forward, step = _step(model, batch, bool(trained), precision, device, kept)
            for parameter in model.parameters():
                parameter.grad = None
    finally:
        for parameter, needs in before.items():
            parameter.requires_grad_(needs)
        for module, training in modes.items():
            module.training = training
    return Speed(forward / tokens, step / tokens, kept.bytes)


def _step(
    model: nn.Module, batch: Any, backward: bool, precision: Precision, device: torch.device, kept: _Kept
) -> tuple[float, float]:
    """Run a step, and return the seconds of its forward and of all of it."""
    started = _now(device)
    with (
        torch.set_grad_enabled(backward),
        torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        output = call_model(model, batch)
        logits = logits_of(output)
        value = predictions(output)[0].value if logits is None else logits
    forward = _now(device) - started
    if backward:
        torch.autograd.backward(value.float().logsumexp(-1).mean())
    return forward, _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Kept:
    """Counts the bytes that autograd keeps for a backward, each storage once, without parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes = 0

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor
