"""Small models that the tests share; each call builds a fresh one."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch import Tensor, nn

from tests.folders import gpt2_folder, text_file  # noqa: F401, fixtures that several tests use
from tests.packages import site  # noqa: F401


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """One thread and one seed, so that tests run side by side and in any order give the same."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


class TiedModel(nn.Module):
    """An embedding, a block and a head that shares the embedding's weight: no library, no `tie_weights`."""

    def __init__(self, vocabulary: int = 40, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        x = x + self.down(torch.relu(self.up(x)))
        logits: Tensor = self.head(self.norm(x))
        return logits


def make_gpt2(**options: Any) -> Any:
    """A random model of GPT-2's architecture, tied, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 4, "n_embd": 32, "n_head": 4, "vocab_size": 60, "n_positions": 32}
    config = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **options})
    return GPT2LMHeadModel(config).eval()


def make_llama(**options: Any) -> Any:
    """A random model of LLaMA's architecture, tied, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 60,
        "max_position_embeddings": 32,
    }
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **tokens, "tie_word_embeddings": True, **options})).eval()


@pytest.fixture
def gpt2() -> Any:
    return make_gpt2()


@pytest.fixture
def untied_gpt2() -> Any:
    return make_gpt2(tie_word_embeddings=False)


@pytest.fixture
def llama() -> Any:
    return make_llama()


@pytest.fixture
def tied() -> TiedModel:
    return TiedModel().eval()


@pytest.fixture
def ids() -> Tensor:
    """Token ids (2, 7), all below the vocabularies of the models above."""
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The real SmolLM2-135M with its tokenizer; it is shared, so tests work on deep copies."""
    from tdkit.errors import MissingDependencyError
    from tdkit.sources.models import load_model

    try:
        return load_model("smollm2")
    except MissingDependencyError as error:
        pytest.skip(str(error))
