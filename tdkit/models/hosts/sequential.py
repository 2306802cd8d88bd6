"""The factors of a matrix as the weights of plain layers, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.products.convolution import Stage


class PlainStages:
    """The stages of matrices as layers of torch compute them: with parameters of their own, one set for each matrix."""

    def __init__(self) -> None:
        self._of: dict[tuple[object, ...], list[Stage] | None] = {}  # by the id of a matrix, kernel and groups
        self._matrices: list[FactorizedMatrix] = []  # keep the ids valid

    def __call__(
        self, matrix: FactorizedMatrix, kernel: tuple[int, ...] = (), groups: int = 1
    ) -> Sequence[Stage] | None:
        """Returns the convolutions that one after the other equal the one with this weight; ``kernel=()`` is a product.

        Returns:
            The stages, whose weights are new parameters; None if the factors form no such chain, or one whose layers
            act on a part of the channels.
        """
        key = id(matrix), kernel, groups
        if key not in self._of:
            self._matrices.append(matrix)
            with torch.enable_grad():  # a view tells whether its factor is trained
                stages = matrix.convolutions(kernel, groups)
            is_plain = stages is not None and all(stage.outer == (1, 1) for stage in stages)
            self._of[key] = [_owned(stage) for stage in stages or ()] if is_plain else None
        return self._of[key]


def _owned(stage: Stage) -> Stage:
    values = stage.weight.detach().clone(memory_format=torch.contiguous_format)
    return replace(stage, weight=nn.Parameter(values, requires_grad=stage.weight.requires_grad))
