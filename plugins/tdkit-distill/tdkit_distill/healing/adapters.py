"""Low-rank updates of dense layers that are trained in the place of their weights, and merged into these afterwards.

Source: Hu et al., LoRA (2022), section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdkit_distill.data.order import mixed_seed
from tdkit_distill.errors import StageError

PATTERN = "*.parametrizations.weight.0.*"  # of the names of what is trained


class LowRankUpdate(nn.Module):
    """Adds B A to a weight (out, in), with B (out, rank) zero at first and A (rank, in) uniform."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        bound = columns**-0.5
        start = (2 * torch.rand(rank, columns, generator=generator) - 1) * bound
        self.a = nn.Parameter(start.to(weight))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


@contextmanager
def adapters(model: nn.Module, rank: int, seed: int) -> Iterator[list[str]]:
    """Put low-rank updates on the dense linear layers of a model, and merge them into the weights on leaving.

    Layers that share their weight with another module, such as a head with the embedding, are left alone.

    Yields:
        The names of the layers.

    Raises:
        StageError: when the model has no such layer.
    """
    layers = dict(_dense_layers(model))
    if not layers:
        raise StageError(
            f"{type(model).__name__} has no dense linear layer of its own weight to adapt: heal all, or factors"
        )
    for name, layer in layers.items():
        generator = torch.Generator().manual_seed(mixed_seed(seed, "adapter", name))
        update = LowRankUpdate(layer.weight, min(rank, *layer.weight.shape), generator)
        parametrize.register_parametrization(layer, "weight", update)
    try:
        yield list(layers)
    finally:
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            _weight_first(layer)


def _dense_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        kind = type(module)
        is_linear = kind is nn.Linear or (kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils")
        if is_linear and users[id(module.weight)] == 1:
            yield name, module


def _weight_first(layer: nn.Module) -> None:
    """Put the weight of a layer before its other parameters again, where linear layers have it."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if name != "weight":
            delattr(layer, name)
            layer.register_parameter(name, parameter)
