"""A language model small enough for every command: GPT-2 architecture, random weights, a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

SENTENCE = "the state of our union is strong and people work for peace with hope in every land"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2,000 words of text."""
    generator = torch.Generator().manual_seed(0)
    words = SENTENCE.split()
    picks = torch.randint(len(words), (2000,), generator=generator)
    path = tmp_path_factory.mktemp("text") / "speech.txt"
    path.write_text(" ".join(words[i] for i in picks), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A saved transformers model with tied embeddings and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train([str(text_file)], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<eos>"]))
    folder = tmp_path_factory.mktemp("gpt2")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1, pad_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


NET = """from torch import nn


def build():
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
"""


def stand_ins(folder: Path, gpt2_folder: Path) -> Path:
    """Make what commands of the documentation name, in a folder, which is returned.

    ``smollm2`` is a small model with its names of layers, which comes before the registered one; ``my_pkg.nets:build``
    builds a torch module, with ``net.safetensors``, ``train.safetensors`` and ``test.safetensors``.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **special, vocab_size=300, num_key_value_heads=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder / "smollm2")
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(folder / "smollm2")
    (folder / "my_pkg").mkdir()
    (folder / "my_pkg" / "nets.py").write_text(NET, encoding="utf-8")
    save_file(nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))).state_dict(), folder / "net.safetensors")
    for name in ("train", "test"):
        data = {"inputs": torch.randn(40, 32), "labels": torch.arange(40) % 32}
        save_file(data, folder / f"{name}.safetensors")
    return folder
