"""Text that a language model generates itself, to calibrate on beside a text of one kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.batches import Batch, Weighted, call_of, check_batches, unweighted
from tdkit.calibration.runner import as_it_was, device_of
from tdkit.errors import CalibrationError
from tdkit.sources.positions import check_positions
from tdkit.support.progress import progress_bar

SHARE = 0.1  # SmolLM2, joint at 60%: held-out calibration text 1% worse; code and its manual 2 to 3 times better
TOGETHER = 32  # windows


def first_token_of(model: nn.Module) -> int:
    """Returns the token that a generated text begins with: the model's first token of a text, or its last one.

    Raises:
        CalibrationError: when the model does not generate text, or has neither token.
    """
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    if not callable(generates) or not generates() or getattr(config, "is_encoder_decoder", False):
        raise CalibrationError(
            f"self_generated= is for causal language models of transformers, and {type(model).__name__} is none: "
            "leave it out"
        )
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
    raise CalibrationError(
        f"self_generated=: the config of {type(model).__name__} has no bos_token_id and no eos_token_id to begin with"
    )


def with_self_generated(
    model: nn.Module,
    batches: Iterable[Batch],
    tokens: int,
    *,
    context: int = 512,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> list[Batch]:
    """Returns batches and windows that the model generates, which get the weight `SHARE` of all tokens together.

    Raises:
        CalibrationError, SourceError: as `self_generated`.
    """
    if tokens < 1:
        raise CalibrationError(f"self_generated={tokens}: give a number of tokens, 0 for none")
    check_batches(batches)
    given = list(batches)
    units = sum(unweighted(batch)[1] * call_of(model, batch).units for batch in given)
    ids = self_generated(model, tokens, context=context, device=device, progress=progress)
    weight = SHARE / (1 - SHARE) * units / ids.numel()
    return given + [Weighted(row[None].clone(), weight) for row in ids]


def self_generated(
    model: nn.Module,
    tokens: int,
    *,
    context: int = 512,
    seed: int = 0,
    together: int = TOGETHER,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Tensor:
    """Returns windows of text that the model generates from nothing but its first token, at temperature 1.

    A window goes on behind the end of a text, as windows of a longer text do.

    Args:
        model: a causal language model of transformers.
        tokens: how many to generate; whole windows, at least one.
        context: tokens per window.
        seed: of the random generator.
        together: how many windows are generated at a time.
        device: the device to generate on; the model is moved back afterwards. When None, the model is not moved.
        progress: show a progress bar; when None, only on a terminal.

    Returns:
        Token ids (windows, context), int64, on the CPU.

    Raises:
        CalibrationError: when the model does not generate text, or has no token to begin with.
        SourceError: when a window has more tokens than the model has positions.

    Sources: Liu et al., LLM-QAT (2023), section 2.1; Williams et al., self-calibration (2025), section 3.
    """
    first, count = first_token_of(model), max(tokens // context, 1)
    check_positions(model, context)
    from transformers import GenerationConfig, StoppingCriteriaList

    def shown(ids: Tensor, *_: Any, **__: Any) -> Tensor:  # after each token; no window stops here
        bar.advance()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=context - 1, pad_token_id=first)
    generate: Any = model.generate
    found = []
    with (
        as_it_was(model, device, freeze=False),
        _generating_by(model, config),
        progress_bar("generate", -(-count // together) * (context - 1), progress) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, count, together):
            ids = torch.full((min(together, count - start), 1), first, device=device_of(model))
            every = StoppingCriteriaList([shown])
            ids = generate(input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=every)
            found.append(ids.cpu())
    return torch.cat(found)


@contextmanager
def _generating_by(model: nn.Module, config: Any) -> Iterator[None]:
    """A context manager inside which a model has this generation config, and does not add its own to it.

    Its own has the token that ends a text, and can have a temperature, a penalty or tokens that are never generated.
    """
    name = "generation_config"
    before = [(module, vars(module)[name]) for module in model.modules() if name in vars(module)]
    try:
        for module, _ in before:
            setattr(module, name, config)
        yield
    finally:
        for module, own in before:
            setattr(module, name, own)
