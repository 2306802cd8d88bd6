"""Models and inputs of two sizes, for what is recorded with the one and run with the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.decompositions.registered import decompositions
from tests.conftest import make_gpt2, make_llama
from tests.kinds import OF_MATRICES

OF_TENSORS = ["tucker", "cp", "spatial_low_rank"]


class Logits(nn.Module):
    """A model of transformers that returns its logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        options = {} if x.is_floating_point() else {"use_cache": False}
        logits: Tensor = self.model(x, **options).logits
        return logits


class Images(nn.Module):
    """Convolutions of every kind with what a ResNet has besides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.reflected = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.wider = nn.ConvTranspose2d(16, 12, 3, stride=2, output_padding=1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        h = h + self.reflected(torch.relu(self.grouped(h)))
        y: Tensor = self.head(torch.relu(self.wider(h)).mean((2, 3)))
        return y


class Sequences(nn.Module):
    """An LSTM in both directions, a GRU and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(32, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(self.lstm(x)[0])[0])
        return y


def make_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5))


def make_mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 60, "experts_implementation": "eager"}
    return MixtralForCausalLM(MixtralConfig(**sizes, **more, bos_token_id=0, eos_token_id=0, pad_token_id=None))


def tokens(*size: int) -> Tensor:
    return torch.randint(0, 60, size)


BATCH, LENGTH = Dim("batch"), Dim("length", max=32)
SIDES = {0: BATCH, 2: Dim.AUTO, 3: Dim.AUTO}

Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], dict[int, Any]]

CASES: dict[str, Case] = {
    "gpt2": (lambda: make_gpt2(n_layer=1), lambda: (tokens(2, 7), tokens(3, 11)), {0: BATCH, 1: LENGTH}),
    "llama": (
        lambda: make_llama(num_hidden_layers=1),
        lambda: (tokens(2, 7), tokens(3, 11)),
        {0: BATCH, 1: LENGTH},
    ),
    "experts": (make_mixtral, lambda: (tokens(2, 7), tokens(3, 11)), {0: BATCH, 1: LENGTH}),
    "images": (Images, lambda: (torch.randn(2, 3, 16, 16), torch.randn(3, 3, 24, 20)), SIDES),
    "vit": (make_vit, lambda: (torch.randn(2, 3, 16, 16), torch.randn(3, 3, 16, 16)), {0: BATCH}),
    "sequences": (Sequences, lambda: (torch.randn(2, 7, 12), torch.randn(3, 11, 12)), {0: BATCH, 1: LENGTH}),
}
"""By name: makes the model, makes the inputs to record and to run with, and the sizes that change between them."""


def every(*names: str) -> list[tuple[str, str]]:
    """Returns the cases with every decomposition that applies; that of `Auto` is always one of the others."""
    kinds = [kind for kind in OF_MATRICES if kind != "auto"]
    return [(name, kind) for name in names for kind in [*kinds, *(OF_TENSORS if name == "images" else ())]]


def compressed(name: str, kind: str) -> nn.Module:
    """Returns the compressed model of a case, in eval mode, with one tensor in and one out."""
    make = decompositions.get(kind)
    rules = [Rule("*", make())]
    if kind in OF_TENSORS:
        rules = [Rule("*", make(), types=("Conv2d",), budget=0.8), Rule("*", LowRank(rank=3))]
    policy = Policy(rules, budget=None if kind in OF_TENSORS else 0.7, allow_growth=True)
    model = tdkit.compress(CASES[name][0](), policy, progress=False).eval()
    return Logits(model) if hasattr(model, "config") else model
