"""Which models predict next tokens, found by running them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdkit.calibration.batches import Call, call_of
from tdkit.calibration.causality import is_causal

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
MODELS = [
    ("GPT2LMHeadModel", {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2}, True),
    ("LlamaForCausalLM", SIZES, True),
    ("MixtralForCausalLM", {**SIZES, "num_key_value_heads": 2}, True),
    ("MambaForCausalLM", {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, True),
    ("BertLMHeadModel", {**SIZES, "is_decoder": True}, True),
    ("BertForMaskedLM", SIZES, False),
    ("RobertaForMaskedLM", SIZES, False),
    ("BertLMHeadModel", SIZES, False),  # a decoder's head on an encoder
    ("BartForConditionalGeneration", {"vocab_size": 60, "d_model": 16, **BART}, False),
]


def causal_on(model: nn.Module, batch: Any) -> bool:
    return is_causal(lambda call: call.run(model), call_of(model, batch))


@pytest.mark.parametrize(("name", "config", "causal"), MODELS, ids=[f"{name}-{causal}" for name, _, causal in MODELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 5, 48])
def test_models_of_transformers(
    name: str, config: dict[str, Any], causal: bool, dtype: torch.dtype, length: int
) -> None:
    import transformers

    kind = getattr(transformers, name)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    model = kind(kind.config_class(**config, **special)).to(dtype).eval()
    ids = torch.randint(2, 60, (2, length))
    assert causal_on(model, ids) is causal
    padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if length > 4:
        padded["attention_mask"][:, 3:] = 0
        assert causal_on(model, padded) is causal


class Bag(nn.Module):
    """Every token sees the sum of all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 9)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        return x + x.sum(1, keepdim=True)


def test_plain_modules() -> None:
    ids = torch.randint(9, (2, 6))
    bigram, bag = nn.Sequential(nn.Embedding(9, 9)), Bag()
    assert causal_on(bigram, ids)
    assert not causal_on(bag, ids)
    assert not causal_on(bag, torch.zeros(1, 6, dtype=torch.long))
    assert not causal_on(bigram, ids[:, :1])  # one token predicts nothing
    assert not causal_on(nn.Sequential(nn.Embedding(9, 4)), ids.clamp_min(5))  # fewer classes than tokens
    assert not causal_on(nn.Linear(6, 6), torch.randn(2, 6))


def test_models_of_several_inputs_are_not_tested() -> None:
    def fail(_: Call) -> Any:
        raise AssertionError

    ids = torch.ones(1, 4, dtype=torch.long)
    assert not is_causal(fail, Call((), {"input_ids": ids, "pixel_values": torch.randn(1, 3)}))
