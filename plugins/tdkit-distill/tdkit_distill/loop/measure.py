"""Figures of a student on rows that it was not trained on: cross-entropy, accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tdkit_distill.data.examples import IGNORED, Examples, labels_of
from tdkit_distill.errors import DataError
from tdkit_distill.loop.trainee import Trainee
from tdkit_distill.models.calls import call_model, logits_of, to_device
from tdkit_distill.models.taps import Record


@torch.no_grad()
def held_out_loss(trainee: Trainee, examples: Examples, device: torch.device, *, batch: int, seed: int) -> float:
    """The mean cross-entropy of the student over all labels of some examples, in eval mode."""
    modes = {module: module.training for module in trainee.modules()}
    trainee.eval()
    total, count = 0.0, 0
    try:
        for start in range(0, len(examples), batch):
            rows = torch.arange(start, min(start + batch, len(examples)))
            given = to_device(examples.batch(rows, torch.Generator().manual_seed(seed + start)), device)
            known = int((_labels(given) != IGNORED).sum())
            total += float(trainee(given, None, held_out=True)) * known
            count += known
    finally:
        for module, training in modes.items():
            module.training = training
    return total / count if count else math.nan


def model_loss(model: nn.Module, examples: Examples, device: torch.device, *, batch: int, seed: int) -> float:
    """As `held_out_loss`, of a model that is on the device."""
    trainee = Trainee(model, [], Record(open=False), call_model)
    return held_out_loss(trainee, examples, device, batch=batch, seed=seed)


@torch.no_grad()
def accuracy(model: nn.Module, rows: Examples, *, batch: int = 32) -> float:
    """The share of rows whose largest logit is their label."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    right = 0
    try:
        for start in range(0, len(rows), batch):
            numbers = torch.arange(start, min(start + batch, len(rows)))
            given = to_device(rows.batch(numbers, torch.Generator()), device)
            logits = logits_of(call_model(model, given))
            if not isinstance(logits, Tensor):
                raise DataError("accuracy needs a model that returns logits")
            right += int((logits.argmax(-1) == _labels(given)).sum())
    finally:
        for module, training in modes.items():
            module.training = training
    return right / len(rows)


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    labels = labels_of(batch)
    if labels is None:
        raise DataError("these rows have no labels: add a column of that name")
    return labels
