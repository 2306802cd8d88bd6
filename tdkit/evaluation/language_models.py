"""Perplexity, size and speed of causal language models."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.calibration.batches import Call, is_encoder_decoder
from tdkit.calibration.causality import is_causal
from tdkit.calibration.losses import next_token_logits
from tdkit.calibration.runner import device_of
from tdkit.errors import EvaluationError, SourceError
from tdkit.models.sites import num_bytes, num_params
from tdkit.sources.positions import check_positions
from tdkit.sources.texts import windows
from tdkit.support.progress import progress_bar

PROTOCOL = "non-overlapping windows, each predicting all its tokens but the first; exp of the mean token loss"


@dataclass(frozen=True)
class Evaluation:
    """The results of one model on one text.

    Attributes:
        params: number of parameters; tied ones are counted once.
        bytes: size of the tensors of the saved model; tied ones are counted once.
        perplexity: the perplexity, measured as `PROTOCOL` describes.
        tokens: number of predicted tokens.
        context: window length in tokens.
        tokens_per_second: throughput of the forward passes that measured the perplexity.
    """

    params: int
    bytes: int
    perplexity: float
    tokens: int
    context: int
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "protocol": PROTOCOL}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    ids: Tensor,  # (n,) token ids
    *,
    context: int = 1024,
    batch: int = 1,
    progress: bool | None = None,
) -> Evaluation:
    """Measure a causal language model on a row of token ids.

    Args:
        model: called as ``model(ids)`` with ids (batch, context), int64; its output, or the ``logits`` of its output,
            is (batch, context, vocabulary).
        ids: the token ids of the text; an incomplete last window is dropped.
        context: tokens per window, at least 2.
        batch: windows per forward pass.
        progress: show a progress bar; when None, only on a terminal.

    Raises:
        EvaluationError: when the model does not take text, or is no causal language model, which is tested by running
            it; the message says how to measure it.
        SourceError: when the text does not fill one window, or the context is shorter than 2 tokens or longer than
            the position table of the model.
    """
    check_takes_text(model)
    device = device_of(model)
    rows = windows(ids, context)
    if context < 2:
        raise SourceError(f"a context of {context} predicts nothing: give at least 2 tokens")
    check_positions(model, context)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    loss, seconds = torch.zeros((), dtype=torch.float64), 0.0
    try:
        check_causal(model, rows[0])
        with progress_bar("perplexity", len(rows), progress) as bar:
            for start in range(0, len(rows), batch):
                chunk = rows[start : start + batch].to(device)
                started = time.perf_counter()
                output = model(chunk)
                logits = _logits(model, output, chunk)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds += time.perf_counter() - started
                targets = chunk[:, 1:].reshape(-1)
                losses = F.cross_entropy(logits[:, :-1].reshape(len(targets), -1).float(), targets, reduction="sum")
                loss += losses.double().cpu()
                bar.advance(len(chunk))
    finally:
        for module, training in modes:
            module.training = training
    tokens = rows.numel() - len(rows)
    mean = float(loss) / tokens
    return Evaluation(
        params=num_params(model),
        bytes=num_bytes(model),
        perplexity=math.inf if mean >= 700 else math.exp(mean),  # NaN stays NaN
        tokens=tokens,
        context=context,
        tokens_per_second=rows.numel() / seconds if seconds else math.inf,
    )


MEASURE_OTHERWISE = (
    "measure it in Python on batches of its inputs, with labels by tdkit.evaluation.score(model, batches, metric) or "
    "against the dense model by tdkit.evaluation.agreement(model, dense, batches)"
)

TESTED_TOKENS = 64


def check_takes_text(model: nn.Module, doing: str = "perplexity", remedy: str = MEASURE_OTHERWISE) -> None:
    """Check, without running it, that a model takes one text.

    Args:
        doing: what is done with text, for the message of an error.
        remedy: what to do instead, for the message of an error.

    Raises:
        EvaluationError: when it is a model of transformers that takes other inputs than text, or an encoder-decoder.
    """
    name, takes = type(model).__name__, getattr(model, "main_input_name", "input_ids")
    if takes != "input_ids":
        raise EvaluationError(f"{doing} is that of a language model on text, and {name} takes {takes}: {remedy}")
    if is_encoder_decoder(model):
        raise EvaluationError(f"{doing} is that of a model on one text, and {name} is an encoder-decoder: {remedy}")


@torch.inference_mode()
def check_causal(
    model: nn.Module,
    ids: Tensor,  # (n,) token ids
    doing: str = "perplexity",
    remedy: str = MEASURE_OTHERWISE,
) -> None:
    """Check that a model, which is in eval mode, is a causal language model, by running it on the first tokens.

    Args:
        ids: some token ids.
        doing: what is done with text, for the message of an error.
        remedy: what to do instead, for the message of an error.

    Raises:
        EvaluationError: when it gives no logits for each token, or they depend on later tokens.
    """
    call = Call((ids[None, :TESTED_TOKENS].to(device_of(model)),), {})
    _logits(model, call.run(model), call.args[0], doing, remedy)
    if not is_causal(lambda other: other.run(model), call):
        raise EvaluationError(
            f"{doing} is that of the next tokens, and {type(model).__name__} is no causal language model, because its "
            f"logits depend on later tokens: {remedy}"
        )


def _logits(
    model: nn.Module, output: Any, ids: Tensor, doing: str = "perplexity", remedy: str = MEASURE_OTHERWISE
) -> Tensor:
    logits = next_token_logits(output, Call((ids,), {}))
    if logits is None:
        raise EvaluationError(
            f"{doing} is that of the next tokens, and {type(model).__name__} returns no logits (batch, context, "
            f"vocabulary) of these: {remedy}"
        )
    return logits


def perplexity(model: nn.Module, ids: Tensor, *, context: int = 1024, batch: int = 1) -> float:
    """Returns the perplexity of a causal language model on token ids (n,); see `evaluate`."""
    return evaluate(model, ids, context=context, batch=batch).perplexity
