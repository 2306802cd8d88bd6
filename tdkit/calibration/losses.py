"""The default losses of a calibration: with the labels of the data, or with labels drawn from the predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.errors import CalibrationError, did_you_mean

Labels = Literal["data", "sampled"]

IGNORED = -100  # the label that the cross-entropy of torch and transformers ignores


def check_labels(labels: str) -> Labels:
    """Returns `labels`, narrowed to the type `Labels`.

    Raises:
        CalibrationError: when it is neither "data" nor "sampled".
    """
    known: tuple[Labels, ...] = get_args(Labels)
    for each in known:
        if each == labels:
            return each
    raise CalibrationError(f"no labels '{labels}'{did_you_mean(labels, known) or '.'} Known: {', '.join(known)}")


def data_loss(output: Any, batch: Any) -> Tensor:
    """Returns the model's own loss where the output has one, else the next-token cross-entropy; summed over tokens.

    Raises:
        CalibrationError: when the output has no loss, and no logits (n, tokens, classes) that match the token ids.
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
    """Returns the number of labels that a model's own mean loss averages over: those that are not ignored.

    The label of the first token is not counted for a causal model, which does not predict that token.
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
    """Returns the cross-entropy with labels sampled from the model's own predictions, summed over all predictions.

    The second moment of its gradients is the Fisher information: the curvature of the divergence between the
    predictions of the model and those after a small change. With the labels of the data the second moment also
    contains the model's errors. For a causal language model each next token is sampled given the tokens of the data.

    Args:
        output: logits (..., classes), or an object with such a ``logits`` attribute.
        batch: predictions are ignored where its ``attention_mask`` is zero, or where its ``labels``, if they
            have the shape of the predictions, are -100.
        seed: of the random generator.

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
    """Sample one class (...,) per row of logits (..., classes) from their softmax, the same on every device."""
    uniform = torch.rand(logits.shape[:-1], generator=torch.Generator().manual_seed(seed)).to(logits.device)
    reached = logits.float().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(reached, (uniform * reached[..., -1])[..., None], right=True).squeeze(-1)
    return drawn.clamp_max(logits.shape[-1] - 1)  # rounding, or NaN logits, can give an index past the last class


def _logits(output: Any) -> Tensor | None:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _continued(logits: Tensor | None, batch: Any) -> Tensor | None:
    """Returns the token ids (n, tokens) of the batch if `logits` are (n, tokens, classes), else None."""
    ids = token_ids(batch)
    return ids if ids is not None and logits is not None and logits.shape[:-1] == ids.shape else None


def token_ids(batch: Any) -> Tensor | None:
    """Returns the 2-D tensor that is taken for token ids (n, tokens): ``input_ids``, the first entry or the batch."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple) else batch
    return ids if isinstance(ids, Tensor) and ids.ndim == 2 else None


def attention_mask(batch: Any) -> Tensor | None:
    """Returns the attention mask (n, tokens), bool, True for real tokens; None when the batch has no 2-D mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _unmasked(targets: Tensor, batch: Any) -> Tensor:
    """Set `targets` (n, tokens - 1), which start at the second token, to IGNORED where the mask is zero."""
    mask = attention_mask(batch)
    return targets if mask is None else targets.masked_fill(~mask[:, 1:], IGNORED)


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="sum")
