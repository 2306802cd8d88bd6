"""The losses whose gradients calibrate: the data's own, and one with labels that the model draws itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.errors import CalibrationError, did_you_mean

Labels = Literal["data", "sampled"]

IGNORED = -100  # a label that counts nothing, as torch and transformers have it


def check_labels(labels: str) -> Labels:
    """`labels`, if it is one of `Labels`.

    Raises:
        CalibrationError: otherwise.
    """
    known: tuple[Labels, ...] = get_args(Labels)
    for each in known:
        if each == labels:
            return each
    raise CalibrationError(f"no labels '{labels}'{did_you_mean(labels, known) or '.'} Known: {', '.join(known)}")


def data_loss(output: Any, batch: Any) -> Tensor:
    """The model's own loss where the batch holds labels, else the next-token cross-entropy, summed over tokens.

    Raises:
        CalibrationError: when the output is neither.
    """
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own * _labelled(output, batch)
    logits = _logits(output)
    ids = _continued(logits, batch)
    if logits is None or ids is None:
        raise CalibrationError(
            "the model is no causal language model on token ids: give loss=(output, batch) -> scalar, put labels "
            "into the batches, or calibrate with gradients=False"
        )
    return _summed(logits[:, :-1], _unmasked(ids[:, 1:], batch))


def _labelled(output: Any, batch: Any) -> int:
    """Over how many labels a model's own loss is the mean: those that are not ignored, for transformers' losses.

    A causal model predicts no first token, so that labels of that position count nothing.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return 1
    if labels.is_floating_point():
        return labels.numel()
    if "CausalLM" in type(output).__name__ and labels.ndim == 2:
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def sampled_loss(output: Any, batch: Any, seed: int) -> Tensor:
    """The cross-entropy with labels drawn from the model's own predictions, summed over all of them.

    The second moment of its gradients is the Fisher information: the curvature of the divergence between what the
    model predicts now and after a small change. That of the data's labels counts what the model gets wrong besides.
    A causal language model draws each next token in the context of the data's.

    Args:
        output: logits (..., classes), or what holds them as ``logits``.
        batch: its mask, or labels of the logits' own shape that are -100, say which predictions do not count.
        seed: of the draw.

    Raises:
        CalibrationError: when there are no logits of two or more classes.

    Source: Kunstner, Hennig and Balles, "Limitations of the empirical Fisher approximation" (2019), section 2.
    """
    logits = _logits(output)
    if logits is None or logits.ndim < 2 or logits.shape[-1] < 2:
        raise CalibrationError(
            "the model gives no logits of two or more classes to draw labels from: calibrate with labels='data'"
        )
    given = batch.get("labels") if isinstance(batch, Mapping) else None
    drawn = _drawn(logits.detach(), seed)
    if isinstance(given, Tensor) and given.shape == drawn.shape:
        return _summed(logits, drawn.masked_fill(given == IGNORED, IGNORED))
    if _continued(logits, batch) is not None:
        return _summed(logits[:, :-1], _unmasked(drawn[:, :-1], batch))
    return _summed(logits, drawn)


def _drawn(logits: Tensor, seed: int) -> Tensor:
    """A class for each row of logits (..., classes), with the probability that they give it; the same on any device."""
    uniform = torch.rand(logits.shape[:-1], generator=torch.Generator().manual_seed(seed)).to(logits.device)
    reached = logits.float().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(reached, (uniform * reached[..., -1])[..., None], right=True).squeeze(-1)
    return drawn.clamp_max(logits.shape[-1] - 1)  # the end of rounding, or of logits that are no numbers


def _logits(output: Any) -> Tensor | None:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _continued(logits: Tensor | None, batch: Any) -> Tensor | None:
    """The token ids (n, tokens) of the batch where `logits` have a prediction of what follows each of them."""
    ids = token_ids(batch)
    return ids if ids is not None and logits is not None and logits.shape[:-1] == ids.shape else None


def token_ids(batch: Any) -> Tensor | None:
    """What may be the token ids (n, tokens) of a batch: its ``input_ids``, its first entry or itself."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple) else batch
    return ids if isinstance(ids, Tensor) and ids.ndim == 2 else None


def attention_mask(batch: Any) -> Tensor | None:
    """The batch's mask (n, tokens), True where a token counts; None where it has none of this form."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _unmasked(targets: Tensor, batch: Any) -> Tensor:
    """`targets` of the positions after the first, ignored where the batch's attention mask hides them."""
    mask = attention_mask(batch)
    return targets if mask is None else targets.masked_fill(~mask[:, 1:], IGNORED)


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="sum")
