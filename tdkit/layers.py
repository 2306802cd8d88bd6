"""Layers that hold a factorised matrix in place of a dense weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix


class FactorizedLayer(nn.Module, ABC):
    """A layer with a factorised `matrix`; `weight` is read-only and dense, built anew when it is read."""

    matrix: FactorizedMatrix

    @property
    @abstractmethod
    def replaces(self) -> str:
        """The type of the layer whose place this one takes, as rules name it."""

    def options(self) -> dict[str, Any]:
        """What its host needs to build it again, beyond the dense layer's own attributes; JSON-able."""
        return {}

    @property
    def weight(self) -> Tensor:
        """The dense weight in the layout of the layer that was replaced."""
        return self.matrix.dense()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would answer a Parameter with "attribute already exists"
            raise AttributeError(
                f"the weight of a {type(self).__name__} is read-only, built from its factors: change the factors in "
                "`matrix`, or put a dense layer in its place"
            )
        super().__setattr__(name, value)


class FactorizedLinear(FactorizedLayer):
    """y = x W^T + bias with a factorised W, in place of ``nn.Linear`` or transformers' ``Conv1D``.

    Args:
        matrix: of shape (out_features, in_features).
        bias: (out_features,) or None.
        transposed: whether `weight` is read as (in, out), as in ``Conv1D``.
    """

    def __init__(self, matrix: FactorizedMatrix, bias: nn.Parameter | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_parameter("bias", bias)
        self.transposed = transposed
        self.out_features, self.in_features = matrix.shape
        if transposed:
            self.nf, self.nx = matrix.shape

    @property
    def replaces(self) -> str:
        return "Conv1D" if self.transposed else "Linear"

    @property
    def weight(self) -> Tensor:
        """The dense weight: (out, in), or (in, out) when `transposed`."""
        return self.matrix.dense().T if self.transposed else self.matrix.dense()

    def forward(
        self,
        x: Tensor,  # (*batch, in_features)
    ) -> Tensor:  # (*batch, out_features)
        return self.matrix.linear(x, cast("Tensor | None", self.bias))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FactorizedEmbedding(FactorizedLayer):
    """Rows of a factorised matrix, in place of ``nn.Embedding``.

    Args:
        matrix: of shape (num_embeddings, embedding_dim).
        padding_idx: the row that gets no gradient.
        zero_padding: whether that row was zero, and so stays exactly zero.
    """

    def __init__(self, matrix: FactorizedMatrix, padding_idx: int | None = None, *, zero_padding: bool = False) -> None:
        super().__init__()
        matrix.lay_out_for_rows()
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = padding_idx
        self.zero_padding = zero_padding

    @property
    def replaces(self) -> str:
        return "Embedding"

    def options(self) -> dict[str, Any]:
        return {"zero_padding": True} if self.zero_padding else {}

    def forward(
        self,
        ids: Tensor,  # (*n,) integers
    ) -> Tensor:  # (*n, embedding_dim)
        self._check(ids)
        rows = self.matrix.rows(ids)
        if self.padding_idx is None:
            return rows
        padding = (ids == self.padding_idx).unsqueeze(-1)
        if self.zero_padding:
            return rows.masked_fill(padding, 0.0)
        return torch.where(padding, rows.detach(), rows)

    def _check(self, ids: Tensor) -> None:
        """Refuse ids that are no row, which a product of digits would wrap around; on CPU, as torch does it."""
        if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= self.num_embeddings:
            bad = low if low < 0 else high
            raise IndexError(f"id {bad} is out of range: the embedding has rows 0 to {self.num_embeddings - 1}")

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"
