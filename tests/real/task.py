"""A task: a model with its own weights, examples to calibrate and train on, and a score on other examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

COUNTED = 8  # examples of a call whose multiply-adds and time are measured


@dataclass(frozen=True)
class Task:
    """A model and what is asked of it.

    Attributes:
        name: of the model.
        what: the task in one sentence, with the sizes of both splits.
        metric: what the score is called; always in percent, larger is better.
        model: the dense model, in eval mode.
        train: columns of equal length; what does not end in ``labels`` is given to the model by name.
        test: the inputs of the examples to score, of which none is in `train`.
        judge: the score in percent of the outputs for `test`.
        distillation: losses by name, of the distillation after the compression.
        batch_size: of the distillation.
        calibration_batch: rows of a calibration batch; a weight whose products are not seen, as an LSTM's, is
            calibrated by one gradient per batch.
        steps: of the distillation.
        lr: of the distillation.
    """

    name: str
    what: str
    metric: str
    model: nn.Module
    train: Mapping[str, Tensor]
    test: tuple[Tensor, ...]
    judge: Callable[[Tensor], float]
    distillation: Mapping[str, Any] = field(default_factory=lambda: {"logits": 1.0})
    batch_size: int = 32
    calibration_batch: int = 32
    steps: int = 200
    lr: float = 1e-3

    def score(self, model: nn.Module) -> float:
        """Returns the score of a model in percent."""
        return self.judge(outputs(model, *self.test))

    def multiply_adds(self, model: nn.Module) -> float:
        """Returns the multiply-adds of a call on COUNTED examples, divided by their number."""
        return multiply_adds(model, tuple(column[:COUNTED] for column in self.test)) / COUNTED

    def batches(self) -> list[dict[str, Tensor]]:
        """Returns the training rows as calibration batches."""
        rows, size = len(next(iter(self.train.values()))), self.calibration_batch
        return [{name: column[i : i + size] for name, column in self.train.items()} for i in range(0, rows, size)]


def signed_outputs(seed: int = 0) -> Callable[[Any, Any], Tensor]:
    """Returns the loss to calibrate with: the sum of the outputs, each times a random sign.

    The second moment of its gradients is the Gauss-Newton matrix of the squared error of the outputs, whatever the
    labels are. The gradients of a loss on labels nearly vanish where a model is nearly always right.
    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix (1990).
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(output: Tensor, batch: Any) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).mul(2).sub(1)
        return (output * signs).sum()

    return loss


def outputs(model: nn.Module, *columns: Tensor, batch: int = 50) -> Tensor:
    """Returns the outputs of `model` on rows of inputs, in eval mode and without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        parts = [model(*(c[i : i + batch] for c in columns)) for i in range(0, len(columns[0]), batch)]
    model.train(training)
    return torch.cat(parts)


def percent(right: Tensor) -> float:
    """Returns the share of true entries, in percent."""
    return 100 * float(right.double().mean())


def multiply_adds(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Returns the multiply-adds of matrix products and convolutions in one forward pass, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # one operator of oneDNN, not counted
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # flags() warns of settings of Intel's GPUs
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(counter)
        model(*inputs)
    return int(counter.get_total_flops()) // 2
