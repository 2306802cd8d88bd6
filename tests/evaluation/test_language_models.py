"""Perplexity against a computation by hand, and what measuring must not disturb."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import EvaluationError, SourceError
from tdkit.evaluation.language_models import PROTOCOL, evaluate, perplexity
from tdkit.sources.positions import check_positions
from tests.tasks import TASKS


class Bigram(nn.Module):
    """The next token's logits are a row of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def by_hand(table: Tensor, ids: list[int], context: int) -> tuple[float, int]:
    """exp of the mean negative log-probability of every token that has a predecessor in its window."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - context + 1, context):
        window = ids[start : start + context]
        for before, after in itertools.pairwise(window):
            row = table[before].double()
            total -= float(row[after] - row.exp().sum().log())
            count += 1
    return math.exp(total / count), count


@pytest.mark.parametrize(("length", "context", "batch"), [(40, 10, 1), (45, 10, 3), (29, 7, 2), (8, 8, 4), (9, 2, 1)])
def test_perplexity_is_what_a_person_computes(length: int, context: int, batch: int) -> None:
    table = torch.randn(6, 6)
    ids = torch.randint(6, (length,))
    found = evaluate(Bigram(table), ids, context=context, batch=batch)
    expected, count = by_hand(table, ids.tolist(), context)
    assert found.perplexity == pytest.approx(expected, rel=1e-6)
    assert found.tokens == count
    assert found.context == context
    assert found.params == 36
    assert found.bytes == 144
    assert found.tokens_per_second > 0
    assert found.to_dict()["protocol"] == PROTOCOL
    assert perplexity(Bigram(table), ids, context=context) == pytest.approx(expected, rel=1e-6)


def test_known_values() -> None:
    ids = torch.randint(6, (60,))
    assert perplexity(Bigram(torch.zeros(6, 6)), ids, context=20) == pytest.approx(6.0)
    cycle = torch.arange(60) % 6
    certain = torch.full((6, 6), -1e4)
    certain[torch.arange(6), (torch.arange(6) + 1) % 6] = 0.0
    assert perplexity(Bigram(certain), cycle, context=20) == pytest.approx(1.0)
    assert perplexity(Bigram(-certain), cycle, context=20) == math.inf
    assert math.isnan(perplexity(Bigram(torch.full((6, 6), math.nan)), cycle, context=20))


def test_a_transformers_model_agrees_with_its_own_loss(gpt2: Any) -> None:
    ids = torch.randint(60, (64,))
    with torch.no_grad():
        loss = gpt2(ids[:64].reshape(4, 16), labels=ids[:64].reshape(4, 16)).loss
    assert perplexity(gpt2, ids, context=16) == pytest.approx(float(loss.exp()), rel=1e-4)


def test_modes_survive_and_dropout_is_off(gpt2: Any) -> None:
    ids = torch.randint(60, (64,))
    gpt2.train()
    gpt2.transformer.h[1].eval()
    modes = [module.training for module in gpt2.modules()]
    assert perplexity(gpt2, ids, context=16) == perplexity(gpt2, ids, context=16)
    assert [module.training for module in gpt2.modules()] == modes


def test_a_model_that_fails_keeps_its_mode() -> None:
    model = Bigram(torch.zeros(2, 2)).train()
    with pytest.raises(IndexError):
        perplexity(model, torch.full((10,), 5), context=5)
    assert model.training


def test_a_compressed_model_is_smaller_and_measured_the_same_way(gpt2: Any) -> None:
    ids = torch.randint(60, (64,))
    before = evaluate(gpt2, ids, context=16)
    tdkit.compress(gpt2, Policy([Rule("*", LowRank())], budget=0.5))
    after = evaluate(gpt2, ids, context=16)
    assert after.params <= 0.5 * before.params
    assert after.bytes <= 0.5 * before.bytes
    assert after.perplexity != before.perplexity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "BertForMaskedLM is no causal language model, because its logits depend on later tokens"),
        ("t5", "T5ForConditionalGeneration is an encoder-decoder"),
        ("vit", "ViTForImageClassification takes pixel_values"),
        ("whisper", "WhisperForConditionalGeneration takes input_features"),
    ],
)
def test_other_models_are_told_how_to_be_measured(name: str, message: str) -> None:
    model, _ = TASKS[name]()
    otherwise = (
        r"tdkit\.evaluation\.score\(model, batches, metric\).*tdkit\.evaluation\.agreement\(model, dense, batches\)"
    )
    with pytest.raises(EvaluationError, match=f"{message}.*{otherwise}"):
        evaluate(model.train(), torch.randint(3, 60, (40,)), context=10)
    assert model.training


def test_an_encoder_without_logits_is_told() -> None:
    model = TASKS["bert"]()[0].bert
    with pytest.raises(EvaluationError, match="BertModel returns no logits"):
        evaluate(model, torch.randint(3, 60, (40,)), context=10)


def test_too_little_text_is_told() -> None:
    model = Bigram(torch.zeros(6, 6))
    with pytest.raises(
        SourceError, match=r"9 tokens do not fill one window of 10: give more text or a shorter context"
    ):
        evaluate(model, torch.zeros(9, dtype=torch.long), context=10)
    for context in (1, 0, -3):
        with pytest.raises(SourceError, match=rf"a context of {context} (predicts nothing|tokens is no window)"):
            evaluate(model, torch.zeros(9, dtype=torch.long), context=context)


def model_of(kind: str, **config: Any) -> Any:
    import transformers

    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    options = {**sizes, "intermediate_size": 16, "max_position_embeddings": 24, **tokens, **config}
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**options))
    return made.eval()


@pytest.mark.parametrize(
    ("kind", "config", "limit"),
    [
        ("GPTNeo", {"attention_types": [[["global"], 1]], "num_layers": 1, "num_heads": 2}, 24),
        ("Bert", {"is_decoder": True}, 24),
        ("Roberta", {"is_decoder": True}, 22),  # positions begin behind the padding's
        ("OPT", {"ffn_dim": 16, "word_embed_proj_dim": 16}, 24),  # its table has 26 rows
    ],
)
def test_a_window_longer_than_the_positions_is_told(kind: str, config: dict[str, Any], limit: int) -> None:
    model, ids = model_of(kind, **config), torch.randint(2, 60, (100,))
    assert math.isfinite(perplexity(model, ids, context=limit))
    with pytest.raises(SourceError, match=rf"{limit + 1} tokens is longer than the {limit} positions of {kind}"):
        evaluate(model, ids, context=limit + 1)
    with pytest.raises((IndexError, RuntimeError)):
        model(ids[None, : limit + 3])


def test_a_compressed_table_of_positions_is_a_limit_too(gpt2: Any) -> None:
    tdkit.compress(gpt2, Policy([Rule("*.wpe", LowRank(rank=2)), Rule("*", keep=True)]), progress=False)
    with pytest.raises(SourceError, match=r"longer than the 32 positions of GPT2LMHeadModel \(transformer.wpe\)"):
        evaluate(gpt2, torch.randint(60, (100,)), context=33)


def test_positions_that_are_computed_are_no_limit(llama: Any) -> None:
    assert math.isfinite(perplexity(llama, torch.randint(60, (100,)), context=50))
    check_positions(Bigram(torch.zeros(2, 2)), 10**6)
