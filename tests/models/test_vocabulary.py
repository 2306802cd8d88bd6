"""``resize_token_embeddings`` of compressed transformers models: exact for low rank, else an error before harm."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import Kronecker, LowRank, Policy, Rule
from tdkit.errors import TdkitError
from tests.conftest import make_gpt2, make_llama

VOCABULARY = 60


def compressed(model: Any, match: str = "*", kind: Any = None) -> Any:
    return tdkit.compress(model, Policy([Rule(match, kind or LowRank(rank=4))], allow_growth=True), progress=False)


def logits(model: Any, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    found: Tensor = model(ids, **more).logits
    return found


def make_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0)).eval()


def make_untied() -> Any:
    return make_llama(tie_word_embeddings=False)


@pytest.mark.parametrize("tokens", [75, 48])
@pytest.mark.parametrize("make", [make_gpt2, make_llama, make_untied, make_t5])
def test_old_tokens_have_the_same_logits(make: Callable[[], Any], tokens: int, ids: Tensor) -> None:
    model = compressed(make())
    expected, shared = logits(model, ids), model.get_input_embeddings().matrix is model.get_output_embeddings().matrix
    embedding = model.resize_token_embeddings(tokens)
    assert embedding is model.get_input_embeddings()
    assert embedding.num_embeddings == embedding.matrix.shape[0] == model.config.vocab_size == tokens
    assert (embedding.matrix is model.get_output_embeddings().matrix) == shared
    kept = min(tokens, VOCABULARY)
    found = logits(model, ids)
    assert found.shape[-1] == tokens
    torch.testing.assert_close(found[..., :kept], expected[..., :kept])
    model.tie_weights()
    assert torch.equal(logits(model, ids), found)
    if tokens > VOCABULARY:
        assert torch.isfinite(logits(model, torch.full((1, 3), tokens - 1))).all()


def test_the_resized_model_is_trained_saved_and_resized_again(ids: Tensor, tmp_path: Any) -> None:
    model = compressed(make_gpt2())
    model.get_input_embeddings().matrix.right.requires_grad_(False)
    model.resize_token_embeddings(65, pad_to_multiple_of=16)
    matrix = model.get_input_embeddings().matrix
    assert matrix.shape == (80, 32)
    assert (matrix.left.requires_grad, matrix.right.requires_grad) == (True, False)
    expected = logits(model, ids)
    expected.sum().backward()
    assert matrix.left.grad is not None
    tdkit.save(model, tmp_path / "saved")
    loaded = tdkit.load(tmp_path / "saved")
    assert torch.equal(logits(loaded, ids), expected)
    loaded.resize_token_embeddings(90)
    torch.testing.assert_close(logits(loaded, ids)[..., :80], expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.resize_token_embeddings(70)
        assert twin.get_input_embeddings().matrix.shape == (70, 32)
        assert matrix.shape == (80, 32)
    assert model.resize_token_embeddings() is model.get_input_embeddings()


def test_new_tokens_are_near_the_mean_of_the_old_ones() -> None:
    model = compressed(make_gpt2())
    old = model.get_input_embeddings().matrix.dense().detach()
    new = model.resize_token_embeddings(70).matrix.dense().detach()
    torch.testing.assert_close(new[:VOCABULARY], old)
    torch.testing.assert_close(new[VOCABULARY:], old.mean(0).expand(10, -1), rtol=0, atol=1e-3)


def test_a_dense_embedding_and_a_factorised_head_are_resized_together(ids: Tensor) -> None:
    model = compressed(make_untied(), "lm_head")
    expected = logits(model, ids)
    model.resize_token_embeddings(75)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.lm_head.out_features == 75
    torch.testing.assert_close(logits(model, ids)[..., :VOCABULARY], expected)


def refused(model: Any, tokens: int, match: str, ids: Tensor) -> None:
    expected = logits(model, ids)
    with pytest.raises(TdkitError, match=match):
        model.resize_token_embeddings(tokens)
    assert model.config.vocab_size == VOCABULARY
    assert torch.equal(logits(model, ids), expected)


def test_other_factors_are_an_error_that_says_what_to_do(ids: Tensor) -> None:
    model = compressed(make_gpt2(), kind=Kronecker(terms=2))
    refused(model, 70, r"transformer.wte \(Embedding, kronecker.*tdkit.to_dense\(model, only='transformer.wte'\)", ids)
    expected = logits(model, ids)
    tdkit.to_dense(model, only="transformer.wte")
    model.resize_token_embeddings(70)
    torch.testing.assert_close(logits(model, ids)[..., :VOCABULARY], expected)


def test_a_head_alone_with_other_factors_is_an_error_before_the_embedding_changes(ids: Tensor) -> None:
    model = compressed(make_untied(), "lm_head", Kronecker(terms=2))
    refused(model, 70, r"lm_head \(Linear, kronecker", ids)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY


def test_fewer_tokens_than_the_rank_are_an_error(ids: Tensor) -> None:
    refused(
        compressed(make_gpt2(), kind=LowRank(rank=30)),
        20,
        "20 tokens are fewer than the rank 30 of transformer.wte",
        ids,
    )


def test_a_scaled_embedding_is_an_error_not_a_silent_loss(ids: Tensor) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCABULARY, "pad_token_id": 0}
    model = compressed(Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **more)).eval())
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    refused(model, 70, r"embed_tokens \(Gemma3TextScaledWordEmbedding, low_rank.*tdkit.to_dense", ids)


def test_an_error_of_transformers_leaves_the_factors(ids: Tensor) -> None:
    model = compressed(make_gpt2())
    expected, embedding = logits(model, ids), model.get_input_embeddings()
    with pytest.raises(ValueError, match="pad the embedding matrix"):
        model.resize_token_embeddings(70, pad_to_multiple_of=1.5)
    assert model.get_input_embeddings() is embedding
    assert torch.equal(logits(model, ids), expected)
    model.tie_weights()
    assert torch.equal(logits(model, ids), expected)


def test_a_model_without_factors_has_its_own_method_again(ids: Tensor) -> None:
    model = compressed(make_gpt2())
    tdkit.to_dense(model)
    assert "resize_token_embeddings" not in vars(model)
    model.resize_token_embeddings(70)
    assert logits(model, ids).shape[-1] == 70
