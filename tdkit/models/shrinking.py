"""The smaller dense weights of a group whose hidden units are removed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdkit.errors import PolicyError
from tdkit.fitting.elimination import refitted
from tdkit.fitting.metric import Metric
from tdkit.models.groups import Group, Part
from tdkit.models.swap import Resized


def shrunk(group: Group, units: Tensor, metric: Metric | None = None) -> Iterator[Resized]:
    """Iterate over what replaces the sites of a group: their weights without the rows and columns of removed units.

    Args:
        units: (kept,) int64, those that stay.
        metric: of the consumer, whose columns are refitted in it.

    Raises:
        PolicyError: when a weight has NaN or infinite entries.
    """
    for part in group.producers:
        rows = part.kept(units).to(part.site.weight.device)
        bias = part.bias
        yield Resized(_finite(part)[rows], None if bias is None else bias.detach()[rows])
    columns = group.consumer.kept(units)
    yield Resized(_refitted(group.consumer, columns, metric), group.consumer.bias)


def masked(group: Group, units: Tensor, metric: Metric | None) -> Resized:
    """Returns what replaces the consumer to compute as if shrunk, in its own size: the other columns are zero."""
    columns = group.consumer.kept(units)
    fitted = _refitted(group.consumer, columns, metric)
    whole = torch.zeros_like(group.consumer.site.weight)
    whole[:, columns.to(whole.device)] = fitted
    return Resized(whole, group.consumer.bias)


def _refitted(part: Part, columns: Tensor, metric: Metric | None) -> Tensor:
    weight = _finite(part)
    return refitted(weight, metric or Metric(), columns.to(weight.device)).to(weight.dtype)


def _finite(part: Part) -> Tensor:
    weight = part.site.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise PolicyError(f"{part.site.name} holds NaN or infinite weights: repair it, or keep it with a rule")
    return weight
