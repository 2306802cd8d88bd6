"""Modules such as users write: parameters of their own, subclasses of layers, layers in unusual roles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Inherits(nn.Linear):
    """A subclass with a constructor of its own and the forward of its base."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2 * width)


class Scales(nn.Linear):
    """A subclass that calls the forward of its base."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 0.5 * super().forward(input)


class ReadsWeight(nn.Linear):
    """A subclass that multiplies by its weight itself."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input @ self.weight.T + self.bias


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales its rows, as those of Gemma and BART."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * math.sqrt(self.embedding_dim)


class SamePadding(nn.Conv2d):
    """A convolution with padding of its own, as that of EfficientNet's TensorFlow port."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        padded = F.pad(input, (1, 1, 1, 1))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class BareParameters(nn.Module):
    """Matrices and a batch of matrices that no layer holds."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.positions = nn.Parameter(torch.randn(1, 16, width))
        self.experts = nn.Parameter(torch.randn(4, width, width) / width**0.5)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(
        self,
        x: Tensor,  # (batch, length, width)
    ) -> Tensor:
        x = (x + self.positions[:, : x.shape[1]]) @ self.query * self.scale
        return torch.einsum("bli,eio->blo", x, self.experts)


class Lists(nn.Module):
    """Matrices in a list and a dictionary of parameters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.steps = nn.ParameterList([nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(3)])
        self.named = nn.ParameterDict({"gate": torch.randn(width, width) / width**0.5})

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.tanh(x @ step)
        return x * torch.sigmoid(x @ self.named["gate"])


class Tied(nn.Module):
    """A head that shares the weight of the embedding, and a layer that is used twice."""

    def __init__(self, vocabulary: int = 40, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.first = nn.Linear(width, width)
        self.second = self.first
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(self.embed(ids))))))
        return logits


class Keywords(nn.Module):
    """Layers that are called with keyword arguments."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.up = nn.Linear(width, 2 * width)
        self.convolution = nn.Conv1d(2 * width, width, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(input=self.embed(input=ids))
        convolved: Tensor = self.convolution(input=x.transpose(1, 2))
        return convolved


class Cells(nn.Module):
    """A cell that runs over a sequence step by step."""

    def __init__(self, cell: type[nn.RNNCellBase], width: int = 24) -> None:
        super().__init__()
        self.cell = cell(width, 32)  # type: ignore[call-arg]

    def forward(
        self,
        x: Tensor,  # (batch, length, width)
    ) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        output: Tensor = state[0] if isinstance(state, tuple) else state
        return output


class Attention(nn.Module):
    """Attention of torch from one sequence to another."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **sizes)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = self.attention(query, key, value)[0]
        return output


class Functional(nn.Module):
    """A layer whose weight is used by a function, and not by the layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)
        self.out = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(F.linear(x, self.projection.weight, self.projection.bias))
        return y


class AutoregressiveLSTM(nn.Module):
    """A language model with an embedding, a stack of LSTM layers and a head."""

    def __init__(self, vocabulary: int = 40, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.embed(ids))[0])
        return logits
