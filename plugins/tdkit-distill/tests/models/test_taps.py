"""Taps: they see what the model computes, change nothing, and always go away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_models import Plain, bert, gpt2, ids, llama
from torch import nn

from tdkit_distill.errors import StageError
from tdkit_distill.models.taps import tapped


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


CASES = [
    (gpt2, "transformer.h.1.attn", True),
    (llama, "model.layers.1.self_attn", True),
    (bert, "bert.encoder.layer.1.attention.self", False),
]


@pytest.mark.parametrize(("build", "name", "causal"), CASES)
def test_scores_are_those_whose_softmax_the_model_uses(build: Any, name: str, causal: bool) -> None:
    model = build().eval()
    x = ids(3)
    model.set_attn_implementation("eager")
    expected = model(x, output_attentions=True)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), tapped(model, attention=[name]) as record:
        output = model(x)
        seen = record.attention[name]
        scores = seen.scores
        if seen.allowed is not None:
            scores = scores.masked_fill(~seen.allowed, float("-inf"))
    assert causal == (seen.allowed is not None)
    assert torch.allclose(scores.softmax(-1), expected.attentions[1], atol=1e-6)
    assert torch.allclose(output.logits, expected.logits, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_padding_is_not_allowed() -> None:
    model = bert().eval()
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:] = 0
    with tapped(model, attention=["bert.encoder.layer.0.attention.self"]) as record:
        model(ids(3), attention_mask=mask)
        allowed = record.attention["bert.encoder.layer.0.attention.self"].allowed
    assert allowed is not None
    assert allowed[0].any(-2).squeeze().tolist() == mask[0].bool().tolist()


def test_outputs_by_name_and_nothing_stays() -> None:
    model = Plain()
    x = ids(2)
    with tapped(model, ["embed", "blocks.1"]) as record:
        logits = model(x)
        assert torch.equal(record.outputs["embed"], model.embed.weight[x])
        assert record.outputs["blocks.1"].shape == (2, 8, 12)
        assert hooks(model) == 2
    assert hooks(model) == 0
    assert not record.outputs
    assert torch.equal(model(x), logits)


def test_an_exception_inside_leaves_no_hook() -> None:
    model = gpt2()
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), tapped(model, ["transformer.h.0"], ["transformer.h.0.attn"]):
        raise RuntimeError("inside")
    assert hooks(model) == 0
    assert model.config._attn_implementation == before
    assert not hasattr(model.transformer.h[0].attn, "_tdkit_attention_recorder")


def test_an_unknown_name_is_told_before_any_hook_stays() -> None:
    model = gpt2()
    with (
        pytest.raises(StageError, match=r"did you mean 'transformer.h.0.mlp'"),
        tapped(model, ["transformer.h.1", "transformer.h.0.mpl"]),
    ):
        pass
    assert hooks(model) == 0


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, weights = self.inner(x, x, x, average_attn_weights=False)
        return out, weights


def test_attention_of_another_library_is_read_from_the_output() -> None:
    model = nn.Sequential(OwnAttention())
    with tapped(model, attention=["0"]) as record:
        model(torch.randn(2, 5, 16))
        assert record.attention["0"].are_probabilities
        assert torch.allclose(record.attention["0"].scores.sum(-1), torch.ones(2, 4, 5))
    with tapped(plain := Plain(), attention=["blocks.0"]), pytest.raises(StageError, match="returns no"):
        plain(ids(1))
