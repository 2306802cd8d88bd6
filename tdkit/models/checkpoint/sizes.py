"""Dense layers that are smaller than the class and config of their model make them: `Shrink` leaves such layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tdkit.errors import CheckpointError
from tdkit.models.checkpoint.rewriting import places_of, user_of
from tdkit.models.sites import Site
from tdkit.models.swap import Resized, Swap
from tdkit.shapes import Shape, is_weight_shape
from tdkit.support.compatibility import parameters_of

Sizes = Mapping[str, Shape]
"""Maps the names of layers to the shapes (out, in) of their weights."""


def sizes_of(description: Mapping[str, Any], place: str) -> dict[str, Shape]:
    """Returns the checked sizes of a description; none in one of an earlier version.

    Raises:
        CheckpointError: when they are malformed.
    """
    given = description.get("sizes", {})
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{place} is damaged: 'sizes' is malformed")
    for name, shape in given.items():
        right = isinstance(shape, list) and len(shape) == 2 and is_weight_shape(shape)
        if not isinstance(name, str) or not right:
            raise CheckpointError(f"{place} is damaged: layer {name} has no size {shape!r}")
    return {name: (shape[0], shape[1]) for name, shape in given.items()}


def resize(swap: Swap, sizes: Sizes, place: str) -> None:
    """Replace layers of the model of `swap` by uninitialised dense ones of other sizes.

    Args:
        swap: of a dense model, which may be on the meta device.
        place: the folder, for messages.

    Raises:
        CheckpointError: when the layers are not those of this model.
    """
    places = places_of(swap.model)
    for name, shape in sizes.items():
        user = user_of(swap, name, places, place)
        module = swap.dense(user.layer)
        if not user.host.resizes or user.weight != "weight":
            raise CheckpointError(f"{place}: layer {name} is a {user.kind} in this model, whose size is not changed")
        old = user.host.canonical(parameters_of(module)["weight"], "weight")
        bias = parameters_of(module).get("bias")
        if bias is not None and len(bias) != shape[0]:
            bias = nn.Parameter(bias.new_empty(shape[0]), bias.requires_grad)
        weight = torch.empty(shape, dtype=old.dtype, device=old.device)
        swap.put([(Site((user,), tuple(old.shape)), Resized(weight, bias))])
