"""Measure a model on batches with labels by accuracy, mean squared error or a metric of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.batches import Batch, Call, moved
from tdkit.calibration.causality import is_causal
from tdkit.calibration.losses import (
    IGNORED,
    class_rows,
    next_token_logits,
    one_prediction,
    predicts_next,
    squared_errors,
    tensor_labels,
)
from tdkit.calibration.outputs import own_loss
from tdkit.calibration.runner import as_it_was, device_of
from tdkit.errors import CalibrationError, EvaluationError, did_you_mean
from tdkit.evaluation.running import count_of, run
from tdkit.support.devices import check_device
from tdkit.support.progress import progress_bar

Metric = Callable[[Any, Batch], Tensor | float]

REMEDY = "give metric=(output, batch) -> the value of each example"


def score(
    model: nn.Module,
    batches: Iterable[Batch],
    metric: str | Metric = "accuracy",
    *,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> float:
    """Returns the mean of a metric over all examples of `batches`.

    The model runs in eval mode without gradients; its mode, its device and the random state are restored.

    Args:
        model: any torch module.
        batches: an iterable of batches, as in `calibrate`; built-in metrics need labels in them.
        metric: one of

            - "accuracy": the share of integer labels that are the class of the largest logit; labels of -100 are
              ignored. Labels of a causal language model are those of the next tokens, and the token ids themselves
              when there are none.
            - "mse": the mean squared error of all entries of an output, with floating-point labels of its shape.
            - a function (model output, batch) -> tensor of values, whose entries are averaged over all batches, or one
              number, which counts as often as the batch has examples. The batch is on the device of the model.
        device: the device to run on; the model is moved back afterwards. When None, the model is not moved.
        progress: show a progress bar; when None, only on a terminal.

    Raises:
        EvaluationError: when there are no batches, the model does not take them, or the metric does not apply to its
            outputs or labels.
    """
    measure = _metric(metric)
    device, total = check_device(device), count_of(batches)
    whole, count = torch.zeros((), dtype=torch.float64), 0
    with (
        torch.inference_mode(False),
        as_it_was(model, device, freeze=False),
        torch.inference_mode(),
        progress_bar("score", total, progress) as bar,
    ):
        for number, batch in enumerate(batches):
            call, output = run(model, batch, number)
            try:
                values, times = measure(model, output, call, batch)
            except CalibrationError as error:
                raise EvaluationError(f"batch {number}: {error}") from None
            whole += values.double().sum().cpu() * times
            count += values.numel() * times
            bar.advance()
    if not count:
        raise EvaluationError("there is nothing to score: the batches are none, empty, or all their labels are ignored")
    return float(whole) / count


_Measure = Callable[[nn.Module, Any, Call, Batch], tuple[Tensor, int]]
"""Returns the values of one batch, and how often each counts."""


def _metric(metric: str | Metric) -> _Measure:
    built_in: dict[str, _Measure] = {"accuracy": _Accuracy(), "mse": _mse}
    if callable(metric):
        return _Own(metric)
    if metric not in built_in:
        known = ", ".join(built_in)
        raise EvaluationError(
            f"no metric '{metric}'{did_you_mean(metric, built_in) or '.'} Known: {known}; or {REMEDY}"
        )
    return built_in[metric]


class _Own:
    """A metric of the user's."""

    def __init__(self, function: Metric) -> None:
        self.function = function

    def __call__(self, model: nn.Module, output: Any, call: Call, batch: Batch) -> tuple[Tensor, int]:
        found = self.function(output, moved(batch, device_of(model)))
        try:
            values = torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):
            raise CalibrationError(f"the metric returned a {type(found).__name__}: {REMEDY}") from None
        return values, call.examples if not values.ndim else 1


class _Accuracy:
    """Whether the largest logit is that of the label, 0 or 1 for each label that is not ignored."""

    def __init__(self) -> None:
        self.causal: bool | None = None  # found on the first batch without labels

    def __call__(self, model: nn.Module, output: Any, call: Call, _: Batch) -> tuple[Tensor, int]:
        logits, labels = self._next_tokens(model, output, call) if call.labels is None else _labelled(output, call)
        known = labels != IGNORED
        return logits[known].argmax(-1) == labels[known], 1

    def _next_tokens(self, model: nn.Module, output: Any, call: Call) -> tuple[Tensor, Tensor]:
        logits, ids = next_token_logits(output, call), call.token_ids
        if self.causal is None:
            self.causal = is_causal(lambda other: other.run(model), call)
        if not self.causal or logits is None or ids is None:
            raise CalibrationError(
                "accuracy needs labels, except for a causal language model on token ids: give batches (inputs, labels) "
                f"or with an entry 'labels', {REMEDY}, or compare with the dense model by tdkit.evaluation.agreement"
            )
        targets = ids[:, 1:].long()
        if call.mask is not None:
            targets = targets.masked_fill(~call.mask[:, 1:], IGNORED)
        return logits[:, :-1].flatten(0, 1), targets.flatten()


def _labelled(output: Any, call: Call) -> tuple[Tensor, Tensor]:
    found, labels = one_prediction(output, REMEDY), tensor_labels(call, REMEDY)
    if labels.is_floating_point():
        raise CalibrationError(f"accuracy is for integer labels, and these are {labels.dtype}: give 'mse', or {REMEDY}")
    if call.passed and predicts_next(found.value, labels, own_loss(output, call)):
        return found.value[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return class_rows(found, labels, REMEDY)


def _mse(_: nn.Module, output: Any, call: Call, __: Batch) -> tuple[Tensor, int]:
    return squared_errors(one_prediction(output, REMEDY), tensor_labels(call, REMEDY), REMEDY), 1
