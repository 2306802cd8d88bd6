"""Find the loss and the predictions in what a model returned: a tensor, a tuple, a mapping or an object."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tdkit.calibration.batches import Call


def entry(output: Any, name: str) -> Any:
    """Returns the entry of a mapping or the attribute of an object called `name`, or None."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def own_loss(output: Any, call: Call) -> Tensor | None:
    """Returns the loss that the model itself computed, or None.

    It is called ``loss`` or, when the model got the labels, is a scalar that is the output or comes first in a tuple.
    """
    loss = entry(output, "loss")
    if loss is None and call.passed:
        first = output[0] if isinstance(output, tuple | list) and output else output
        loss = first if isinstance(first, Tensor) and not first.ndim else None
    return loss if isinstance(loss, Tensor) and loss.is_floating_point() and loss.numel() == 1 else None


@dataclass(frozen=True)
class Prediction:
    """The tensor of a model's output that holds its predictions.

    Attributes:
        name: its name in the output; empty for a tensor that has none.
        value: a floating-point tensor.
    """

    name: str
    value: Tensor

    @property
    def is_hidden(self) -> bool:
        """Whether these are hidden states rather than logits or values."""
        return "hidden" in self.name


def predictions(output: Any) -> list[Prediction]:
    """Returns the candidates for the predictions in an output: one, where it is clear which tensor they are.

    It is clear for a tensor, for the first tensor of a tuple (behind a loss), and for an entry of a mapping, or an
    attribute of an object, that is called ``logits`` or is the only floating-point tensor.
    """
    if isinstance(output, Tensor):
        return [Prediction("", output)] if output.is_floating_point() else []
    if isinstance(entry(output, "logits"), Tensor):
        return [Prediction("logits", entry(output, "logits"))]
    if isinstance(output, tuple | list) and not hasattr(output, "_fields"):
        found = (predictions(each) for each in output if not (isinstance(each, Tensor) and not each.ndim))
        return next((candidates for candidates in found if candidates), [])
    return [
        Prediction(name, value)
        for name, value in _entries(output).items()
        if isinstance(value, Tensor) and value.is_floating_point() and name != "loss"
    ]


def _entries(output: Any) -> Mapping[str, Any]:
    if isinstance(output, Mapping):
        return output
    if isinstance(output, tuple):
        return {name: getattr(output, name) for name in getattr(output, "_fields", ())}
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return getattr(output, "__dict__", {})
