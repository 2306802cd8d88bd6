"""Compare the outputs of a compressed model with those of the dense one, which needs no labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.batches import Batch, Call
from tdkit.calibration.outputs import Prediction, predictions
from tdkit.calibration.runner import as_it_was
from tdkit.errors import EvaluationError
from tdkit.evaluation.running import count_of, run
from tdkit.support.devices import check_device
from tdkit.support.progress import progress_bar


@dataclass(frozen=True)
class Agreement:
    """How well the outputs of two models agree.

    Attributes:
        relative_error: ||y - y_dense|| / ||y_dense||, the Frobenius norms over all outputs of all batches.
        top1: the share of predictions with the largest logit at the same class; None when the outputs are no logits.
        predictions: the number of predictions that `top1` is the share of; 0 when it is None.
    """

    relative_error: float
    top1: float | None
    predictions: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def agreement(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Batch],
    *,
    output: Callable[[Any], Tensor] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Agreement:
    """Compare the outputs of `model` with those of `dense` on the same batches; labels are not needed.

    What is compared is ``logits`` where the output has them, else the output itself or its first floating-point
    tensor. Positions of padding, by ``attention_mask``, are left out. The outputs are taken for logits if they are
    called so, or if they are a tensor (n, classes); the classes are the last dimension, and the second one of logits
    (n, classes, height, width).

    Both models run in eval mode without gradients; their modes, devices and the random state are restored.

    Args:
        model: the compressed model.
        dense: the model before; `compress` works in place, so copy it before, with ``copy.deepcopy``.
        batches: an iterable of batches, as in `calibrate`.
        output: a function model output -> tensor that gives what is to be compared.
        device: the device to run both on; they are moved back afterwards. When None, the models are not moved.
        progress: show a progress bar; when None, only on a terminal.

    Raises:
        EvaluationError: when the models are one object, there are no batches, a model does not take them, or the
            outputs hold no floating-point tensor or differ in shape.
    """
    if model is dense:
        raise EvaluationError(
            "agreement compares a model with itself: compress works in place, so keep a copy.deepcopy of the dense "
            "model"
        )
    device, total = check_device(device), count_of(batches)
    error, norm = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    same, count, number = 0, 0, -1
    with (
        torch.inference_mode(False),
        as_it_was(model, device, freeze=False),
        as_it_was(dense, device, freeze=False),
        torch.inference_mode(),
        progress_bar("agreement", total, progress) as bar,
    ):
        for number, batch in enumerate(batches):
            call, found = run(model, batch, number)
            y, expected = _compared(found, output), _compared(run(dense, batch, number)[1], output)
            if y.value.shape != expected.value.shape:
                raise EvaluationError(
                    f"batch {number}: the outputs of the models have the shapes {tuple(y.value.shape)} and "
                    f"{tuple(expected.value.shape)}"
                )
            ours, theirs = _unpadded(y.value, call), _unpadded(expected.value.to(y.value.device), call)
            error += (ours.double() - theirs.double()).square().sum().cpu()
            norm += theirs.double().square().sum().cpu()
            if (classes := _classes(y)) is not None:
                equal = y.value.argmax(classes) == expected.value.to(y.value.device).argmax(classes)
                equal = _unpadded(equal, call)
                same, count = same + int(equal.sum()), count + equal.numel()
            bar.advance()
    if number < 0:
        raise EvaluationError("there are no batches: give at least one")
    return Agreement(_ratio(float(error), float(norm)), same / count if count else None, count)


def _ratio(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else (math.inf if error else 0.0)


def _compared(output: Any, choose: Callable[[Any], Tensor] | None) -> Prediction:
    found = predictions(output if choose is None else choose(output))
    if not found:
        raise EvaluationError(
            f"the model returns a {type(output).__name__} without a floating-point tensor to compare: give output=, a "
            "function that takes the model output and returns a tensor"
        )
    return found[0]


def _unpadded(value: Tensor, call: Call) -> Tensor:
    """Returns the entries of `value` (n, tokens, ...) at unmasked tokens; all of them when the mask does not fit."""
    return value if call.mask is None or value.shape[:2] != call.mask.shape else value[call.mask]


def _classes(found: Prediction) -> int | None:
    """Returns the dimension of the classes of logits, or None when the predictions are not known to be logits."""
    value = found.value
    is_logits = value.ndim > 1 if found.name == "logits" else value.ndim == 2 and not found.name
    dimension = 1 if value.ndim > 3 else -1
    return dimension if is_logits and value.shape[dimension] > 1 else None
