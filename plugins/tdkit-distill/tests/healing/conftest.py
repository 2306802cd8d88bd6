"""A teacher that has learned a text, and a student of low rank that has lost most of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tdkit
import torch
from distill_models import gpt2, text

from tdkit_distill import distill

POLICY = tdkit.Policy([tdkit.Rule("*.mlp.*", tdkit.LowRank(rank=2))])


@pytest.fixture(scope="session")
def taught() -> Any:
    """A small GPT-2 that predicts `text`."""
    torch.set_num_threads(1)
    model = gpt2(2, 32)
    stage = {"losses": {"cross_entropy": 1}, "steps": 120, "batch_size": 16, "optimizer": {"lr": 1e-2}}
    distill(model, None, stage, text(256))
    return model.eval()


@pytest.fixture
def student(taught: Any) -> Any:
    """The same, with MLPs of rank two."""
    return tdkit.compress(copy.deepcopy(taught), POLICY, progress=False)


SENTENCE = "the state of our union is strong and people work for peace with hope in every land"
WORDS = SENTENCE.split()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``dense``, a small GPT-2 that has learned ``text``; ``smaller``, the same compressed; and an ``other`` text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("healing")
    picks = torch.randint(len(WORDS), (1,), generator=torch.Generator().manual_seed(0)).item()
    lines = [WORDS[(picks + k * (1 + k // len(WORDS) % 3)) % len(WORDS)] for k in range(6000)]
    (place / "text.txt").write_text(" ".join(lines), encoding="utf-8")
    (place / "other.txt").write_text(" ".join(reversed(lines)), encoding="utf-8")
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train([str(place / "text.txt")], trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    model = gpt2(2, 32, vocabulary=len(tokenizer))
    ids = torch.tensor(tokenizer(" ".join(lines))["input_ids"]).reshape(-1, 16)[:300]
    stage = {"losses": {"cross_entropy": 1}, "steps": 120, "batch_size": 16, "optimizer": {"lr": 1e-2}}
    distill(model, None, stage, ids)
    tdkit.save(model, place / "dense", tokenizer=tokenizer)
    smaller = tdkit.compress(copy.deepcopy(model), POLICY, progress=False)
    card = tdkit.Card(base_model=str(place / "dense"))
    tdkit.save(smaller, place / "smaller", tokenizer=tokenizer, card=card)
    return {name: place / name for name in ("dense", "smaller")} | {n: place / f"{n}.txt" for n in ("text", "other")}
