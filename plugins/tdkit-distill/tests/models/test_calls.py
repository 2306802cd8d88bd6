"""Which entries of a batch a model is called with, and how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tdkit_distill.errors import StageError
from tdkit_distill.models.calls import call_model

ONE, TWO = torch.tensor([1.0]), torch.tensor([2.0])


class Echo(nn.Module):
    """Returns its arguments."""

    def forward(self, x: Any, mask: Any = None, *, scale: Any = None) -> Any:
        return x, mask, scale


class Trainer(nn.Module):
    def forward(self, inputs: Any, target: Any, labels: Any = None) -> Any:
        return inputs, target, labels


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Echo()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("model", [Echo(), Wrapper()])
@pytest.mark.parametrize("labels", [{}, {"labels": TWO}, {"next_sentence_labels": TWO}])
def test_inputs_by_name_and_by_position(model: nn.Module, labels: dict[str, Any]) -> None:
    assert call_model(model, {"input_ids": ONE, **labels}) == (ONE, None, None)
    assert call_model(model, {"0": ONE, "1": TWO, **labels}) == (ONE, TWO, None)
    assert call_model(model, {"x": ONE, "scale": TWO, **labels}) == (ONE, None, TWO)


def test_labels_go_to_no_model_but_to_one_that_takes_a_target() -> None:
    assert call_model(Echo(), {"x": ONE, "target": TWO}) == (ONE, None, None)
    assert call_model(Echo(), {"pixels": ONE, "label": TWO}) == (ONE, None, None)
    assert call_model(Trainer(), {"inputs": ONE, "target": TWO, "labels": TWO}) == (ONE, TWO, None)


def test_a_single_entry_is_passed_by_its_name_if_forward_has_it() -> None:
    class Second(nn.Module):
        def forward(self, ids: Any = None, embeddings: Any = None) -> Any:
            return ids, embeddings

    assert call_model(Second(), {"embeddings": ONE}) == (None, ONE)
    assert call_model(Second(), {"input_ids": ONE}) == (ONE, None)


def test_entries_that_forward_does_not_take() -> None:
    with pytest.raises(StageError, match=r"a batch has 'maks'; did you mean 'mask'\?, which Echo.forward"):
        call_model(Echo(), {"x": ONE, "maks": TWO})
