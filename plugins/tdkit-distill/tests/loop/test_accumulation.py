"""A step in several parts is the step in one: the same loss and gradients, however many labels each part has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_models import bert, ids, llama, uneven
from torch import Tensor, nn

from tdkit_distill import Table, distill

Step = tuple[dict[str, float], dict[str, Tensor]]


def masked_bert(seed: int) -> Any:
    from transformers import BertForMaskedLM

    config = bert().config
    torch.manual_seed(seed)
    return BertForMaskedLM(config)


def one_step(student: nn.Module, teacher: nn.Module, losses: Any, columns: dict[str, Tensor], parts: int) -> Step:
    """The terms of one step over all rows in so many parts, and the gradient of every parameter before clipping.

    In float64, so that what differs is the weighting and not the rounding.
    """
    student, teacher = student.double(), teacher.double()
    gradients: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradients[name] = parameter.grad.clone()

        return hook

    handles = [p.register_post_accumulate_grad_hook(keep(name)) for name, p in student.named_parameters()]
    stage = {"losses": losses, "steps": 1, "batch_size": len(columns["input_ids"]), "accumulation": parts}
    history = distill(student, teacher, stage, Table(columns), running={"device": "cpu"}).history
    for handle in handles:
        handle.remove()
    entry = history[0]
    assert entry["loss"] == pytest.approx(sum(entry["terms"].values()))
    return entry["terms"], gradients


def assert_same(found: Step, expected: Step) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    assert largest > 0
    for name, gradient in expected[1].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-6 * largest, rtol=0), name


@pytest.mark.parametrize(
    "losses",
    [
        {"cross_entropy": 1},
        {"logits": {"temperature": 2.0}},
        {"logits": {"where": "labels"}},
        {"logits": {"kind": "mse"}},
        {"logits": {"kind": "jensen_shannon", "top_k": 3}},
        {"hidden": {"distance": "mse"}},
        {"hidden": {"distance": "cosine", "reduce": "mean"}},
        {"embedding": 1},
        {"ffn": 1},
        {"attention": 1},
        {"attention_scores": {"reduce": "mean"}},
        {"cross_entropy": 1, "logits": 1, "hidden": 1, "attention_scores": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [masked_bert, lambda seed: llama(seed=seed)], ids=["bert", "llama"])
def test_parts_with_unlike_numbers_of_tokens_and_labels(build: Any, losses: dict[str, Any]) -> None:
    whole = one_step(build(seed=1), build(seed=2), losses, uneven(), 1)
    for parts in (2, 4, 16):
        assert_same(one_step(build(seed=1), build(seed=2), losses, uneven(), parts), whole)


def test_outputs_with_and_without_positions_in_one_term() -> None:
    """The pooled output has one vector for each row, so that its mean is over rows and not over tokens."""
    columns = {**uneven(), "labels": torch.arange(16) % 2}
    columns["labels"][3:9] = -100
    layers = {name: name for name in ("bert.encoder.layer.1", "bert.pooler")}
    losses = {"hidden": {"layers": layers}, "cross_entropy": 1, "logits": 1}
    whole = one_step(bert(seed=1), bert(), losses, columns, 1)
    assert_same(one_step(bert(seed=1), bert(), losses, columns, 4), whole)


def test_pairs_of_which_some_are_not_labelled() -> None:
    columns = {**uneven(), "next_labels": torch.arange(16) % 2}
    columns["next_labels"][:7] = -100
    whole = one_step(bert(seed=1), bert(), {"next_sentence": 1}, columns, 1)
    assert_same(one_step(bert(seed=1), bert(), {"next_sentence": 1}, columns, 4), whole)


def test_a_step_without_any_label_is_zero() -> None:
    columns = {"input_ids": ids(8), "labels": torch.full((8, 8), -100)}
    terms, _ = one_step(masked_bert(1), masked_bert(2), {"cross_entropy": 1}, columns, 2)
    assert terms == {"cross_entropy": 0.0}
