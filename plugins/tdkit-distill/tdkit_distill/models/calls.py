"""How a model is run on a batch, and where the logits are in what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tdkit.calibration.batches import call_of
from tdkit.calibration.outputs import entry, predictions
from tdkit.errors import CalibrationError
from torch import Tensor, nn

from tdkit_distill.data.examples import is_label
from tdkit_distill.errors import StageError

Call = Callable[[Any, Mapping[str, Tensor]], Any]


def call_model(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """``model(**batch)`` without the labels.

    Entries whose names are numbers are positional arguments, and so is a single entry whose name is no parameter of the
    model's forward: a module need not name its argument ``input_ids`` or ``pixel_values``.

    Raises:
        StageError: for an entry that forward does not take.
    """
    known = inspect.signature(model.forward).parameters
    given = {name: value for name, value in batch.items() if name in known or not is_label(name)}
    inputs = {name: value for name, value in given.items() if not name.endswith("labels")}
    single = len(inputs) == 1 and not inputs.keys() & known.keys()
    if single or (inputs and all(name.isdecimal() for name in inputs)):
        return model(*inputs.values())
    try:
        return call_of(model, inputs).run(model)
    except CalibrationError as error:
        raise StageError(str(error)) from None


def logits_of(output: Any) -> Tensor | None:
    """The logits (batch, ..., classes) in what a model returned; None without any.

    They are its ``logits`` or ``prediction_logits``, or else the output itself or its first floating-point tensor.
    Of logits (batch, classes, height, width), or with more dimensions, the classes are moved to the end.
    """
    found = entry(output, "prediction_logits")
    if not isinstance(found, Tensor):
        known = [prediction.value for prediction in predictions(output) if prediction.name in ("", "logits")]
        found = known[0] if len(known) == 1 else None
    if not isinstance(found, Tensor):
        return None
    logits: Tensor = found.movedim(1, -1) if found.ndim > 3 else found
    return logits


def tensor_of(output: Any, path: str, place: str) -> Tensor:
    """A floating-point tensor of what a model returned.

    Args:
        path: names and numbers, joined by dots: ``last_hidden_state``, ``1.0``. When empty, the tensor that holds the
            predictions: the output itself, its ``logits``, its first tensor when it is a tuple, or its only one.
        place: what asks, for the error.

    Raises:
        StageError: when there is no such tensor, or with an empty path several could be meant.
    """
    if not path:
        found = predictions(output)
        if len(found) != 1:
            names = ", ".join(f"'{prediction.name}'" for prediction in found) or "no floating-point tensor"
            raise StageError(f"{place} returns a {type(output).__name__} with {names}: say which, tensors=[NAME]")
        return found[0].value
    here = output
    for part in path.split("."):
        if isinstance(here, tuple | list) and part.isdecimal():
            here = here[int(part)] if int(part) < len(here) else None
        else:
            here = entry(here, part)
    if not isinstance(here, Tensor) or not here.is_floating_point():
        names = ", ".join(map(str, output)) if isinstance(output, Mapping) else ""
        raise StageError(
            f"{place} returns a {type(output).__name__} without a floating-point tensor '{path}'"
            + (f"; it has {names}" if names else "")
        )
    return here


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same batch on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
