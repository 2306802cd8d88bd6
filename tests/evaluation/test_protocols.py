"""Windows, strides and means, against computations by hand and the scripts that papers used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.errors import SourceError
from tdkit.evaluation.language_models import PROTOCOL, evaluate
from tdkit.evaluation.protocols import GPT2, LLAMA, NAMED, Protocol, Window, named
from tests.conftest import make_gpt2


def by_script(model: Any, ids: Tensor, context: int, stride: int) -> Tensor:
    """The losses of windows as the perplexity script of transformers' documentation takes them: labels of -100."""
    losses, done = [], 0
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids))
        row = ids[None, start:end]
        labels = row.clone()
        labels[:, : -(end - done)] = -100
        if (labels[:, 1:] != -100).any():
            losses.append(model(row, labels=labels).loss)
        done = end
        if end == len(ids):
            break
    return torch.stack(losses)


@pytest.mark.parametrize(("length", "context", "stride"), [(70, 16, 16), (64, 16, 16), (70, 16, 8), (33, 16, 16)])
@torch.no_grad()
def test_the_protocol_of_gpt2_is_that_of_the_script(length: int, context: int, stride: int) -> None:
    model, ids = make_gpt2(initializer_range=0.3), torch.randint(60, (length,))
    expected = by_script(model, ids, context, stride).mean().exp()
    protocol = Protocol(context=context, stride=stride, partial=True, mean="windows")
    for batch in (1, 3):
        found = evaluate(model, ids, protocol=protocol, batch=batch)
        assert found.perplexity == pytest.approx(float(expected), rel=1e-5)
    assert found.stderr is not None
    assert found.stderr > 0


@torch.no_grad()
def test_the_protocol_of_llama_drops_the_last_window_and_averages_tokens() -> None:
    model, ids = make_gpt2(initializer_range=0.3), torch.randint(60, (70,))
    rows = ids[:64].reshape(4, 16)
    losses = F.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert evaluate(model, ids, protocol=Protocol(context=16)).perplexity == pytest.approx(float(losses.exp()))


def test_every_token_is_predicted_once() -> None:
    for protocol in (Protocol(context=8, stride=3, partial=True), Protocol(context=8, stride=1, partial=True)):
        predicted = [place for window in protocol.windows(50) for place in range(window.first, window.end)]
        assert predicted == list(range(1, 50))


def test_a_last_window_of_one_token_predicts_nothing() -> None:
    assert Protocol(context=8, partial=True).windows(17)[-1] == Window(8, 16, 9)


def test_the_standard_error_is_that_of_the_mean_over_windows() -> None:
    model, ids = make_gpt2(initializer_range=0.3), torch.randint(60, (160,))
    with torch.no_grad():
        losses = by_script(model, ids, 16, 16).double()
    mean = losses.mean()
    expected = float(mean.exp() * losses.std() / math.sqrt(len(losses)))
    for mean_over in ("tokens", "windows"):  # equal windows: the same
        found = evaluate(model, ids, protocol=Protocol(context=16, mean=mean_over))
        assert found.stderr == pytest.approx(expected, rel=1e-4)
        assert found.windows == 10
    assert evaluate(model, ids[:16], context=16).stderr is None


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (Protocol(context=1), "a context of 1 predicts nothing"),
        (Protocol(context=8, stride=9), "a stride of 9 is none for windows of 8"),
        (Protocol(context=8, stride=0), "a stride of 0 is none"),
        (Protocol(context=51), "50 tokens do not fill one window of 51"),
    ],
)
def test_impossible_windows_are_told(protocol: Protocol, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        protocol.windows(50)


def test_protocols_say_what_they_are() -> None:
    assert Protocol().describe() == PROTOCOL
    assert "the incomplete last one too" in GPT2.describe()
    assert "mean over windows" in GPT2.describe()
    assert LLAMA.context == 2048
    assert "windows every 4 tokens" in Protocol(context=8, stride=4).describe()


def test_protocols_belong_to_registered_texts() -> None:
    from tdkit.sources import text_sources

    assert set(NAMED) <= set(text_sources.names())
    assert named("wikitext-2:/some/folder") is GPT2
    assert named("sotu:evaluation") is None
