"""Generation of transformers with compressed models: caches, beams, drafts and pipelines."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tdkit
from tdkit import LowRank, Policy, Rule, TTMatrix
from tdkit.sources.models import load_model
from tests.conftest import make_gpt2, make_llama

POLICY = Policy([Rule("*.mlp.*", LowRank(rank=6)), Rule("*attn*", TTMatrix(ranks=3)), Rule("*", LowRank(rank=8))])


def made(make: Any) -> Any:
    return tdkit.compress(make(initializer_range=0.3, **LONGER[make]), POLICY, progress=False)


LONGER = {make_gpt2: {"n_positions": 64}, make_llama: {"max_position_embeddings": 64}}


@torch.inference_mode()
def greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    """Token by token, without a cache."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("prepared", [False, True])
def test_generation_with_caches(make: Any, cache: str | None, prepared: bool, prompt: Tensor) -> None:
    model = made(make)
    expected = greedy(model, prompt, 8)
    model = tdkit.prepare(model) if prepared else model
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), cache_implementation=cache, disable_compile=True, **options
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_beams_find_what_exhaustive_search_finds(make: Any, prompt: Tensor) -> None:
    """With as many beams as tokens, two steps of a beam search are exhaustive."""
    model = made(make)
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    one = prompt[:1]
    found = model.generate(one, attention_mask=torch.ones_like(one), num_beams=60, length_penalty=0.0, **options)
    with torch.inference_mode():
        first = model(one).logits[0, -1].log_softmax(-1)
        rows = torch.cat([one.expand(60, -1), torch.arange(60)[:, None]], 1)
        total = first[:, None] + model(rows).logits[:, -1].log_softmax(-1)
    best = int(total.argmax())
    assert found[0, -2:].tolist() == [best // 60, best % 60]


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_a_compressed_model_is_the_draft_of_its_dense_one(make: Any, prompt: Tensor) -> None:
    dense = make(initializer_range=0.3, **LONGER[make])
    draft = tdkit.compress(copy.deepcopy(dense), Policy([Rule("*.mlp.*", LowRank(rank=8))]), progress=False)
    one = prompt[:1]
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = dense.generate(one, attention_mask=torch.ones_like(one), assistant_model=draft, **options)
    assert torch.equal(found, greedy(dense, one, 10))


def test_a_pipeline_reads_a_folder(gpt2_folder: Path, tmp_path: Path) -> None:
    from tokenizers import decoders
    from transformers import pipeline

    source = load_model(str(gpt2_folder))
    tdkit.compress(source.model, Policy([Rule("*", LowRank())], budget=0.7), progress=False)
    tdkit.save(source.model, tmp_path / "smaller", tokenizer=source.tokenizer)
    source.tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()  # the text of the whole is that of its parts
    ids = source.tokenizer("the state of our union", return_tensors="pt")["input_ids"]
    expected = source.tokenizer.decode(greedy(source.model.eval(), ids, 5)[0, ids.shape[1] :])
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    for model in (str(tmp_path / "smaller"), load_model(str(tmp_path / "smaller")).model):
        run = pipeline("text-generation", model=model, tokenizer=source.tokenizer)
        [found] = run("the state of our union", **options)
        assert found["generated_text"] == expected
