"""``nn.Embedding`` and the factorised layer that replaces it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.models.hosts.base import FactorizedLayer, FactorizedModule, Host
from tdkit.models.hosts.sequential import PlainStages
from tdkit.products.recording import is_recorded
from tdkit.support.compatibility import in_transform


class FactorizedEmbedding(FactorizedLayer):
    """Looks up rows of a factorised matrix; replaces ``nn.Embedding``.

    Args:
        matrix: of shape (num_embeddings, embedding_dim).
        padding_idx: the row that gets no gradient.
        zero_padding: return exact zeros for that row, because it was zero in the dense layer.

    The other attributes are those of ``nn.Embedding``, at their defaults: its host refuses others.
    """

    max_norm: None = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    def __init__(self, matrix: FactorizedMatrix, padding_idx: int | None = None, *, zero_padding: bool = False) -> None:
        super().__init__()
        matrix.lay_out_for_rows()
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = padding_idx
        self.zero_padding = zero_padding

    @property
    def host(self) -> str:
        return "embedding"

    @property
    def replaces(self) -> str:
        return "Embedding"

    def options(self) -> dict[str, Any]:
        return {"zero_padding": True} if self.zero_padding else {}

    def forward(
        self,
        input: Tensor,  # noqa: A002, the name that nn.Embedding gives it; (*n,) integers
    ) -> Tensor:  # (*n, embedding_dim)
        self._check(input)
        rows = cast(Tensor, self.matrix(input))
        if self.padding_idx is None:
            return rows
        padding = (input == self.padding_idx).unsqueeze(-1)
        if self.zero_padding:
            return rows.masked_fill(padding, 0.0)
        return torch.where(padding, rows.detach(), rows)

    def _check(self, ids: Tensor) -> None:
        """Raise IndexError for ids out of range, on CPU as torch does; factors would wrap such ids around silently."""
        if ids.device.type != "cpu" or is_recorded() or in_transform() or ids.numel() == 0:
            return
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= self.num_embeddings:
            bad = low if low < 0 else high
            raise IndexError(f"id {bad} is out of range: the embedding has rows 0 to {self.num_embeddings - 1}")

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


class EmbeddingHost(Host):
    """Host of ``torch.nn.Embedding``: weight (num_embeddings, embedding_dim), looked up by row."""

    name = "embedding"
    layer = nn.Embedding
    factorized = FactorizedEmbedding

    def accepts(self, module: nn.Module) -> bool:
        return type(module) is nn.Embedding

    def refusal(self, module: nn.Module, weight: str) -> str | None:
        module = cast(nn.Embedding, module)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"nn.Embedding with {option}={getattr(module, option)} works on dense rows"
        return None

    def build(
        self, module: nn.Module, matrices: Mapping[str, FactorizedMatrix], options: Mapping[str, Any]
    ) -> FactorizedLayer:
        module = cast(nn.Embedding, module)
        return FactorizedEmbedding(matrices["weight"], module.padding_idx, **options)

    def undo(self, layer: FactorizedModule) -> nn.Module:
        layer = cast(FactorizedEmbedding, layer)
        rows, columns = layer.matrix.shape
        dense = nn.Embedding(rows, columns, padding_idx=layer.padding_idx, device="meta")
        weight = layer.matrix.dense().detach().clone()
        if layer.zero_padding:
            weight[layer.padding_idx] = 0.0
        dense.weight = nn.Parameter(weight)
        return dense

    def sequential(self, layer: FactorizedModule, stages: PlainStages) -> nn.Sequential | None:
        """An embedding of the rows of the last factor, and the other factors transposed."""
        layer = cast(FactorizedEmbedding, layer)
        found = stages(layer.matrix)
        if found is None:
            return None
        *others, last = found
        rows, width = last.weight.shape
        embedding = nn.Embedding(rows, width, padding_idx=layer.padding_idx, device="meta")
        embedding.weight = cast(nn.Parameter, last.weight)
        if layer.zero_padding:
            with torch.no_grad():
                embedding.weight[layer.padding_idx] = 0.0
        chain = nn.Sequential(embedding)
        for stage in reversed(others):
            rank, width = stage.weight.shape
            plain = nn.Linear(rank, width, bias=False, device="meta")
            plain.weight = nn.Parameter(stage.weight.T.contiguous(), requires_grad=stage.weight.requires_grad)
            chain.append(plain)
        return chain

    def options(self, module: nn.Module) -> dict[str, Any]:
        module = cast(nn.Embedding, module)
        if module.padding_idx is None:
            return {}
        return {} if bool(module.weight[module.padding_idx].any()) else {"zero_padding": True}

    def adopt(self, layer: nn.Module, options: Mapping[str, Any]) -> None:
        cast(FactorizedEmbedding, layer).zero_padding = bool(options.get("zero_padding", False))
        cast(FactorizedEmbedding, layer).matrix.lay_out_for_rows()

    def multiplications(self, module: nn.Module, weight: str) -> int:
        return 0
