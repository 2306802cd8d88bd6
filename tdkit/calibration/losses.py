"""The default losses of a calibration: with the labels of the data, or with labels drawn from the predictions."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.calibration.batches import Call
from tdkit.calibration.outputs import Prediction, own_loss, predictions
from tdkit.errors import CalibrationError, did_you_mean

Labels = Literal["data", "sampled"]

IGNORED = -100  # the label that the cross-entropy of torch and transformers ignores

REMEDY = "give loss=(output, batch) -> scalar, or calibrate with gradients=False"


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


def data_loss(output: Any, call: Call, *, causal: bool = False, sums_sequences: bool = False) -> Tensor:
    """Returns the loss on the labels of the data, summed so that each prediction has the same weight.

    - The model's own loss, where the output has one, times the number of labels that it is the mean of: all that are
      not ignored or, where they do not have the shape of the predictions, one for each example.
    - Else, with integer labels, the cross-entropy of the predictions (..., classes) or (n, classes, ...); labels of
      -100 are ignored.
    - Else, with floating-point labels of the predictions' shape, the squared error.
    - Else, with a causal language model, the cross-entropy of each next token.

    Args:
        output: what the model returned.
        call: the batch.
        causal: whether the model is a causal language model, so that token ids are labels of the predictions before.
        sums_sequences: whether the model's own loss of labels of another shape is a sum over the examples rather than
            their mean, such as connectionist temporal classification with ``config.ctc_loss_reduction="sum"``.

    Raises:
        CalibrationError: when there are no labels and the model is not causal, or it is not clear from the output and
            the labels what the loss is.
    """
    own = own_loss(output, call)
    if own is not None:
        return own.reshape(()) * _averaged(own, output, call, sums_sequences)
    if call.labels is None:
        return _next_token_loss(output, call, causal)
    found, labels = one_prediction(output, REMEDY), tensor_labels(call, REMEDY)
    if labels.is_floating_point():
        if bool(((labels == 0) | (labels == 1)).all()):
            raise CalibrationError(
                "floating-point labels that are all 0 or 1 can be classes (binary cross-entropy) or values (squared "
                f"error): {REMEDY}"
            )
        return squared_errors(found, labels, REMEDY).sum()
    logits, labels = class_rows(found, labels, REMEDY)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def _next_token_loss(output: Any, call: Call, causal: bool) -> Tensor:
    logits = next_token_logits(output, call)
    if logits is None or not causal or call.token_ids is None:
        raise CalibrationError(
            "there are no labels, and the model is no causal language model on token ids, which needs none: put labels "
            f"into the batches, as (inputs, labels) or as an entry 'labels', {REMEDY}"
        )
    targets = _unmasked(call.token_ids[:, 1:].long(), call.mask)
    return _summed(logits[:, :-1], targets)


def one_prediction(output: Any, remedy: str) -> Prediction:
    """Returns the predictions in an output.

    Args:
        remedy: the end of the message of an error: what to do instead.

    Raises:
        CalibrationError: when it is not clear which tensor they are.
    """
    found = predictions(output)
    if len(found) != 1:
        names = ", ".join(candidate.name for candidate in found) or "no floating-point tensor"
        raise CalibrationError(
            f"the model returns a {type(output).__name__} with {names} and no 'logits', so that it is not clear which "
            f"tensor the labels are for: {remedy}"
        )
    return found[0]


def tensor_labels(call: Call, remedy: str) -> Tensor:
    """Returns the labels of a batch.

    Raises:
        CalibrationError: when there are none, or they are no tensor.
    """
    if isinstance(call.labels, Tensor):
        return call.labels
    if call.labels is None:
        raise CalibrationError(f"there are no labels: give batches (inputs, labels), or an entry 'labels', or {remedy}")
    raise CalibrationError(f"the labels of a batch are a {type(call.labels).__name__}, not a tensor: {remedy}")


def squared_errors(found: Prediction, labels: Tensor, remedy: str) -> Tensor:
    """Returns the squared differences of predictions and floating-point labels, in their shape, float32.

    Raises:
        CalibrationError: when the shapes differ.
    """
    if labels.shape != found.value.shape:
        raise CalibrationError(
            f"labels of shape {tuple(labels.shape)} do not have the shape of the output, {tuple(found.value.shape)}: "
            f"reshape them, or {remedy}"
        )
    return (found.value.float() - labels.float()).square()


def class_rows(found: Prediction, labels: Tensor, remedy: str) -> tuple[Tensor, Tensor]:
    """Returns logits (rows, classes) and integer labels (rows,) of predictions and their labels.

    The classes are the last dimension, or the second one as in the cross-entropy of torch.

    Raises:
        CalibrationError: when `labels` are not classes of these predictions, or both dimensions could be the classes.
    """
    logits, shape = found.value, tuple(found.value.shape)
    last, second = shape[:-1] == labels.shape, shape[:1] + shape[2:] == labels.shape
    problem = ""
    if found.is_hidden:
        problem = f"the model returns {found.name}, and no logits of classes"
    elif logits.ndim < 2 or not (last or second):
        problem = f"the output of shape {shape} has no logits for labels of shape {tuple(labels.shape)}"
    elif last and second and logits.ndim > 2:
        problem = f"the classes of an output of shape {shape} can be its second or its last dimension"
    elif labels.dtype == torch.bool or shape[-1 if last else 1] < 2:
        problem = f"labels of {labels.dtype} and an output of shape {shape} are no choice of one of several classes"
    if problem:
        raise CalibrationError(f"{problem}: {remedy}")
    logits = logits if last else logits.movedim(1, -1)
    rows, classes = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
    outside = classes[(classes != IGNORED) & ((classes < 0) | (classes >= rows.shape[1]))]
    if len(outside):
        raise CalibrationError(f"label {int(outside[0])} is none of the {rows.shape[1]} classes of the output")
    return rows, classes


def _averaged(own: Tensor, output: Any, call: Call, sums_sequences: bool) -> int:
    """Returns the number of predictions that a model's own loss averages over."""
    labels, found = call.labels, predictions(output)
    logits = found[0].value if len(found) == 1 else None
    if not isinstance(labels, Tensor):
        return call.examples
    if labels.is_floating_point():
        return labels.numel()
    if logits is not None and labels.shape not in (logits.shape[:-1], logits.shape[:1] + logits.shape[2:]):
        return 1 if sums_sequences else call.examples  # a loss over sequences, boxes or spans
    shifted = logits is not None and predicts_next(logits, labels, own)
    return int(((labels[:, 1:] if shifted else labels) != IGNORED).sum())


@torch.no_grad()
def predicts_next(logits: Tensor, labels: Tensor, own: Tensor | None) -> bool:
    """Returns whether a model shifts its labels (n, tokens): each position predicts the label of the next one.

    Models of transformers do if they are causal language models. The model's own mean loss `own` is closer to the
    cross-entropy of the next label than to that of the label at the same position.
    """
    fit = logits.ndim == 3 and logits.shape[:-1] == labels.shape and labels.shape[1] > 1
    if own is None or not fit or bool((labels >= logits.shape[-1]).any()):
        return False
    here = _summed(logits, labels) / (labels != IGNORED).sum()
    following = _summed(logits[:, :-1], labels[:, 1:]) / (labels[:, 1:] != IGNORED).sum()
    return bool((following - own).abs() < (here - own).abs())


def sampled_loss(output: Any, call: Call, seed: int, *, causal: bool = False) -> Tensor:
    """Returns the cross-entropy with labels sampled from the model's own predictions, summed over all predictions.

    The second moment of its gradients is the Fisher information: the curvature of the divergence between the
    predictions of the model and those after a small change. With the labels of the data the second moment also
    contains the model's errors. For a causal language model each next token is sampled given the tokens of the data.

    Args:
        output: logits (..., classes), or an object or mapping with such ``logits``.
        call: the batch. Predictions are ignored where its attention mask is zero, or where its labels, if they
            have the shape of the predictions, are -100.
        seed: of the random generator.
        causal: as in `data_loss`.

    Raises:
        CalibrationError: when there are no logits of two or more classes.

    Source: Kunstner, Hennig and Balles, "Limitations of the empirical Fisher approximation" (2019), section 2.
    """
    found = predictions(output)
    logits = found[0].value if len(found) == 1 and not found[0].is_hidden else None
    if logits is None or logits.ndim < 2 or logits.shape[-1] < 2:
        raise CalibrationError(
            "the model gives no logits of two or more classes to draw labels from: calibrate with labels='data'"
        )
    given, drawn = call.labels, _drawn(logits.detach(), seed)
    if isinstance(given, Tensor) and given.shape == drawn.shape and not given.is_floating_point():
        return _summed(logits, drawn.masked_fill(given == IGNORED, IGNORED))
    if next_token_logits(output, call) is None:
        return _summed(logits, drawn)
    if causal:
        return _summed(logits[:, :-1], _unmasked(drawn[:, :-1], call.mask))
    return _summed(logits, drawn if call.mask is None else drawn.masked_fill(~call.mask, IGNORED))


def _drawn(logits: Tensor, seed: int) -> Tensor:
    """Sample one class (...,) per row of logits (..., classes) from their softmax, the same on every device."""
    uniform = torch.rand(logits.shape[:-1], generator=torch.Generator().manual_seed(seed)).to(logits.device)
    reached = logits.float().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(reached, (uniform * reached[..., -1])[..., None], right=True).squeeze(-1)
    return drawn.clamp_max(logits.shape[-1] - 1)  # rounding, or NaN logits, can give an index past the last class


def next_token_logits(output: Any, call: Call) -> Tensor | None:
    """Returns the logits (n, tokens, classes) that belong to the token ids of a batch, or None when there are none."""
    ids, found = call.token_ids, predictions(output)
    if ids is None or len(found) != 1 or found[0].is_hidden or found[0].value.shape[:-1] != ids.shape:
        return None
    return found[0].value if found[0].value.shape[-1] > int(ids.max()) else None


def _unmasked(targets: Tensor, mask: Tensor | None) -> Tensor:
    """Set `targets` (n, tokens - 1), which start at the second token, to IGNORED where the mask is zero."""
    return targets if mask is None else targets.masked_fill(~mask[:, 1:], IGNORED)


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="sum")
