"""Perplexity, size and speed of causal language models."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.calibration.batches import Call, is_encoder_decoder
from tdkit.calibration.causality import is_causal
from tdkit.calibration.losses import next_token_logits
from tdkit.calibration.runner import device_of
from tdkit.errors import EvaluationError
from tdkit.evaluation.protocols import Protocol, Window
from tdkit.models.sites import num_bytes, num_params
from tdkit.sources.positions import check_positions
from tdkit.support.progress import progress_bar

PROTOCOL = Protocol().describe()


@dataclass(frozen=True)
class Evaluation:
    """The results of one model on one text.

    Attributes:
        params: number of parameters; tied ones are counted once.
        bytes: size of the tensors of the saved model; tied ones are counted once.
        perplexity: the perplexity, measured as `protocol` says.
        stderr: the standard error of the perplexity, from the differences between windows; None for one window.
        tokens: number of predicted tokens.
        context: window length in tokens.
        windows: number of windows.
        tokens_per_second: throughput of the forward passes that measured the perplexity.
        protocol: how the perplexity was measured.
    """

    params: int
    bytes: int
    perplexity: float
    stderr: float | None
    tokens: int
    context: int
    windows: int
    tokens_per_second: float
    protocol: Protocol = field(default_factory=Protocol)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "protocol": self.protocol.describe()}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    ids: Tensor,  # (n,) token ids
    *,
    context: int = 1024,
    batch: int = 1,
    protocol: Protocol | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Measure a causal language model on a row of token ids.

    Args:
        model: called as ``model(ids)`` with ids (batch, context), int64; its output, or the ``logits`` of its output,
            is (batch, context, vocabulary).
        ids: the token ids of the text; an incomplete last window is dropped, if `protocol` does not say otherwise.
        context: tokens per window, at least 2; for the default protocol.
        batch: windows per forward pass.
        protocol: how to measure; its context is used.
        progress: show a progress bar; when None, only on a terminal.

    Raises:
        EvaluationError: when the model does not take text, or is no causal language model, which is tested by running
            it; the message says how to measure it.
        SourceError: when the text does not fill one window, or the context is shorter than 2 tokens or longer than
            the position table of the model.
    """
    check_takes_text(model)
    device, protocol = device_of(model), protocol or Protocol(context=context)
    windows = protocol.windows(len(ids))
    check_positions(model, max(window.end - window.start for window in windows))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    sums: list[Tensor] = []
    seconds, seen, loss, count = 0.0, 0, 0.0, 0
    try:
        check_causal(model, ids[windows[0].start : windows[0].end])
        with progress_bar("perplexity", len(windows), progress) as bar:
            for alike in _batches(windows, batch):
                chunk = torch.stack([ids[window.start : window.end] for window in alike]).to(device)
                started = time.perf_counter()
                output = model(chunk)
                logits = _logits(model, output, chunk)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds += time.perf_counter() - started
                seen += chunk.numel()
                first = alike[0].first - alike[0].start
                targets = chunk[:, first:]
                scores = logits[:, first - 1 : -1].reshape(targets.numel(), -1).float()
                losses = F.cross_entropy(scores, targets.reshape(-1), reduction="none").reshape(targets.shape)
                sums.append(losses.double().sum(1).cpu())
                loss += float(sums[-1].sum())
                count += targets.numel()
                bar.so_far(f"perplexity {math.exp(min(loss / count, 700)):.2f}")
                bar.advance(len(chunk))
    finally:
        for module, training in modes:
            module.training = training
    counts = torch.tensor([window.predicted for window in windows], dtype=torch.float64)
    value, stderr = _perplexity(torch.cat(sums), counts, protocol)
    return Evaluation(
        params=num_params(model),
        bytes=num_bytes(model),
        perplexity=value,
        stderr=stderr,
        tokens=int(counts.sum()),
        context=protocol.context,
        windows=len(windows),
        tokens_per_second=seen / seconds if seconds else math.inf,
        protocol=protocol,
    )


def _batches(windows: list[Window], size: int) -> list[list[Window]]:
    """Divide windows into batches of at most `size`, in order, with the same length and the same predicted tokens."""
    found = []
    for _, alike in itertools.groupby(windows, lambda window: (window.end - window.start, window.first - window.start)):
        same = list(alike)
        found += [same[start : start + size] for start in range(0, len(same), size)]
    return found


def _perplexity(
    sums: Tensor,  # (windows,) float64, of the token losses
    counts: Tensor,  # (windows,) float64, of the predicted tokens
    protocol: Protocol,
) -> tuple[float, float | None]:
    """Returns the perplexity and its standard error, that of a ratio estimator over windows times the perplexity.

    Cochran (1977), section 6.4, without the correction for a finite population.
    """
    if protocol.mean == "windows":
        sums, counts = sums / counts, torch.ones_like(counts)
    mean, number = float(sums.sum() / counts.sum()), len(sums)
    value = math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN
    if number < 2:
        return value, None
    spread = float((sums - mean * counts).square().sum())
    return value, value * math.sqrt(spread * number / (number - 1)) / float(counts.sum())


MEASURE_OTHERWISE = (
    "measure it on batches of its inputs, by tdkit eval --data or in Python: with labels by "
    "tdkit.evaluation.score(model, batches, metric) or against the dense model by "
    "tdkit.evaluation.agreement(model, dense, batches)"
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
