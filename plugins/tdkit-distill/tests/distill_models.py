"""Small models that the tests share; each call builds a fresh one."""

from __future__ import annotations

from typing import Any

import tdkit
import torch
from torch import Tensor, nn

VOCABULARY = 48


def gpt2(layers: int = 2, width: int = 16, seed: int = 0, vocabulary: int = VOCABULARY, dropout: float = 0.0) -> Any:
    """A random GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=4,
        vocab_size=vocabulary,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        **drop,
    )
    return GPT2LMHeadModel(config)


def factorized(width: int = 16, dropout: float = 0.0) -> Any:
    """A small GPT-2 with every kind of factorised layer in it; embedding and head share their factors."""
    model = gpt2(2, width, seed=1, dropout=dropout)
    rules = [
        tdkit.Rule("*.wte", tdkit.Kronecker(terms=1, b=(1, 4))),
        tdkit.Rule("*.h.0.mlp.*", tdkit.PermutedKronecker(terms=2, b=(4, 2))),
        tdkit.Rule("*.h.1.mlp.*", tdkit.TTMatrix(ranks=4)),
        tdkit.Rule("*.attn.c_proj", tdkit.LowRank(rank=4)),
    ]
    return tdkit.compress(model, tdkit.Policy(rules))


def llama(layers: int = 2, seed: int = 0) -> Any:
    """A random Llama with grouped keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def bert(layers: int = 2, width: int = 32, seed: int = 0) -> Any:
    """A random BERT classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


class Plain(nn.Module):
    """A language model of no library: an embedding, blocks, a head; called with ids, returns logits."""

    def __init__(self, layers: int = 2, width: int = 12, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


def ids(rows: int = 24, length: int = 8, seed: int = 3) -> Tensor:
    """Random token ids (rows, length)."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def text(rows: int = 64, length: int = 12) -> Tensor:
    """Ids that can be learned: each token is followed by itself plus three."""
    start = torch.randint(VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(1))
    return (start + 3 * torch.arange(length)) % VOCABULARY


def uneven(rows: int = 16, length: int = 8) -> dict[str, Tensor]:
    """Columns of rows with 2 to 8 tokens each, of which some have a label; the first and last rows have none."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    labelled = torch.rand(rows, length, generator=generator) < torch.linspace(0, 0.9, rows).unsqueeze(1)
    labelled[-1] = False
    labels = ids(rows, length, seed=6).masked_fill(~labelled | (mask == 0), -100)
    return {"input_ids": ids(rows, length), "attention_mask": mask, "labels": labels}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold bit-identical parameters and buffers."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


class Convolutional(nn.Module):
    """A classifier of images (n, 1, 12, 12) with batch normalisation and no list of layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return logits


class Recurrent(nn.Module):
    """An encoder of sequences (n, length, 8) to embeddings (n, 16), alone or with its states in a nested tuple."""

    def __init__(self, states: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(8, 48, num_layers=2, batch_first=True)
        self.project = nn.Linear(48, 16)
        self.states = states

    def forward(self, x: Tensor) -> Any:
        outputs, (last, _) = self.lstm(x)
        embedding = self.project(last[-1])
        return (embedding, (outputs, last)) if self.states else embedding


def images(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (rows, 1, 12, 12) of four patterns, and which of them it is."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(4, (rows,), generator=generator)
    return patterns[labels] + 1.5 * torch.randn(rows, 1, 12, 12, generator=generator), labels


def walks(rows: int, seed: int) -> Tensor:
    """Random walks (rows, 10, 8)."""
    return torch.randn(rows, 10, 8, generator=torch.Generator().manual_seed(seed)).cumsum(1)
