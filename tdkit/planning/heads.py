"""The output heads of a model, as far as the model tells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from tdkit.planning.step import Step


def heads(model: nn.Module, steps: Sequence[Step]) -> dict[str, str]:
    """Returns the names of the steps that are output heads, each with what it is recognised by.

    A head is the layer that ``get_output_embeddings()`` (transformers) or ``get_classifier()`` (timm) returns, or one
    with as many outputs as the model has classes (``config.num_labels`` or ``num_classes``). If there is none, it is
    the last layer that multiplies, provided that no weight takes as many inputs as it has outputs: hidden layers have a
    successor.

    Args:
        model: the model of the plan.
        steps: of the plan, in the model's order.
    """
    products = [step for step in steps if step.multiply_adds_before and len(step.shape) == 2]
    found = _returned(model, products) | _by_classes(model, products)
    if found or not products:
        return found
    last = products[-1]
    if any("Conv" in kind and kind != "Conv1D" for kind in last.kinds):
        return {}
    inputs = {step.shape[1] for step in steps}
    return {} if last.shape[0] in inputs else {last.name: "the last layer"}


def _returned(model: nn.Module, products: Sequence[Step]) -> dict[str, str]:
    found: dict[str, str] = {}
    for method in ("get_output_embeddings", "get_classifier"):
        try:
            layer = getattr(model, method)()
        except Exception:  # the method of a foreign class: absent, abstract, or with arguments of its own
            continue
        if isinstance(layer, nn.Module):
            names = {name for name, module in model.named_modules(remove_duplicate=False) if module is layer}
            found |= {step.name: f"{method}()" for step in products if names & set(step.names)}
    return found


def _by_classes(model: nn.Module, products: Sequence[Step]) -> dict[str, str]:
    counts: Mapping[str, object] = {
        "config.num_labels": getattr(getattr(model, "config", None), "num_labels", None),
        "num_classes": getattr(model, "num_classes", None),
    }
    found = {
        step.name: f"{what}={count}" for step in products for what, count in counts.items() if step.shape[0] == count
    }
    return dict(list(found.items())[-1:])  # an earlier layer of the same width is no head


def rank_of(step: Step) -> int:
    """Returns the largest rank that the matrix of a step can have."""
    rank = getattr(step.decomposition, "rank", None)
    full = min(step.shape[0], math.prod(step.shape[1:]))
    return min(rank, full) if isinstance(rank, int) else full
