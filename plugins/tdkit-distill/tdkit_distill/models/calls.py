"""How a model is run on a batch, and where the logits are in what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[Any, Mapping[str, Tensor]], Any]


def call_model(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """``model(**batch)`` without the labels, or ``model(ids)`` when there is nothing but ids.

    The second form is for modules that do not name their argument ``input_ids``.
    """
    inputs = {name: value for name, value in batch.items() if not name.endswith("labels")}
    return model(next(iter(inputs.values()))) if len(inputs) == 1 else model(**inputs)


def logits_of(output: Any) -> Tensor | None:
    """The logits in what a model returned: the output itself when it is a tensor, else
    its ``logits`` or ``prediction_logits``; None without any."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "prediction_logits"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return None


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same batch on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
