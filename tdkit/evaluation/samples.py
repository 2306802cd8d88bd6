"""Texts that a language model continues."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdkit.calibration.runner import device_of
from tdkit.errors import EvaluationError


def check_continues(model: nn.Module, tokenizer: Any, doing: str) -> None:
    """Check that a model can continue a text.

    Raises:
        EvaluationError: otherwise; the message begins with `doing`.
    """
    if tokenizer is None or not hasattr(model, "generate"):
        raise EvaluationError(f"{doing} needs a language model with a tokenizer, and {type(model).__name__} is none")


def continued(model: nn.Module, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Returns a prompt and its greedy continuation by at most `tokens` tokens."""
    inputs = tokenizer(prompt, return_tensors="pt").to(device_of(model))
    generate: Any = model.generate
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=padding)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
