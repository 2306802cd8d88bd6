"""Run models on batches of any kind for a measurement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tdkit.calibration.batches import Batch, Call, call_of, check_batches, check_decoder_inputs, moved
from tdkit.calibration.runner import device_of
from tdkit.errors import CalibrationError, EvaluationError


def run(model: nn.Module, batch: Batch, number: int) -> tuple[Call, Any]:
    """Returns a batch, divided and on the device of the model, and the output of the model.

    Raises:
        EvaluationError: when the model does not take the batch; the message has its number.
    """
    call = call_in(model, batch, number)
    return call, call.run(model)


def call_in(model: nn.Module, batch: Batch, number: int) -> Call:
    """Returns a batch, divided and on the device of the model.

    Raises:
        EvaluationError: when the model does not take the batch; the message has its number.
    """
    try:
        call = call_of(model, moved(batch, device_of(model)))
        check_decoder_inputs(model, call)
    except CalibrationError as error:
        raise EvaluationError(f"batch {number}: {error}") from None
    return call


def count_of(batches: Iterable[Batch]) -> int | None:
    """Returns the number of batches, or None when it is known only at the end.

    Raises:
        EvaluationError: when `batches` are one batch rather than an iterable of batches.
    """
    try:
        check_batches(batches)
        return len(batches)  # type: ignore[arg-type]
    except CalibrationError as error:
        raise EvaluationError(str(error)) from None
    except TypeError:  # a generator, or a DataLoader over a stream
        return None
