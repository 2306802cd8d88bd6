"""Pairs of segments are what they say; their loss is the cross-entropy of the model's own head or of a learned one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_models import VOCABULARY, bert, ids
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit_distill import MaskedPairs, distill
from tdkit_distill.data.masked import MaskTokens
from tdkit_distill.errors import DataError, StageError
from tdkit_distill.losses.loss import Needs, Term, read_losses
from tdkit_distill.models.view import View

TOKENS = MaskTokens(mask=1, start=2, end=3, vocabulary=VOCABULARY)


def rows_of_one_token(count: int = 40, width: int = 12) -> Tensor:
    """Each window repeats a token of its own, so that a stranger in it is seen at once."""
    return (torch.arange(count).unsqueeze(1) % (VOCABULARY - 8) + 8).expand(count, width).contiguous()


def test_pairs_are_two_segments_of_which_half_belong_together() -> None:
    windows = rows_of_one_token()
    examples = MaskedPairs(windows, TOKENS, share=0.0)
    numbers = torch.arange(40).repeat(20)
    batch = examples.batch(numbers, torch.Generator().manual_seed(0))
    text, types, strange = batch["input_ids"], batch["token_type_ids"], batch["next_labels"]
    assert text.shape == types.shape == batch["labels"].shape == (800, examples.length) == (800, 15)
    assert strange.float().mean() == pytest.approx(0.5, abs=0.06)
    assert ((text == 2).nonzero()[:, 1] == 0).all()
    cuts = set()
    for row, kind, differs, number in zip(
        text.tolist(), types.tolist(), strange.tolist(), numbers.tolist(), strict=True
    ):
        first_end = row.index(3)
        cuts.add(first_end - 1)
        assert row[-1] == 3
        assert row.count(3) == 2
        assert kind == [0] * (first_end + 1) + [1] * (len(row) - first_end - 1)
        first, second = set(row[1:first_end]), set(row[first_end + 1 : -1])
        assert first == {int(windows[number, 0])}
        assert len(second) == 1
        assert (first != second) == bool(differs)
    assert cuts == set(range(3, 10))


def test_hidden_tokens_keep_their_places_and_the_draw_is_the_generators() -> None:
    examples = MaskedPairs(ids(400, 50) % 40 + 8, TOKENS)
    batch = examples.batch(torch.arange(400), torch.Generator().manual_seed(0))
    clear = MaskedPairs(ids(400, 50) % 40 + 8, TOKENS, share=0.0)
    plain = clear.batch(torch.arange(400), torch.Generator().manual_seed(0))
    labelled = batch["labels"] != -100
    assert labelled.float().mean() == pytest.approx(0.15 * 50 / 53, rel=0.05)
    assert torch.equal(batch["labels"][labelled], plain["input_ids"][labelled])
    assert torch.equal(batch["input_ids"][~labelled], plain["input_ids"][~labelled])
    assert (batch["input_ids"][labelled] == 1).float().mean() == pytest.approx(0.8, abs=0.02)
    again = examples.batch(torch.arange(400), torch.Generator().manual_seed(0))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert examples.fingerprint != clear.fingerprint


def test_too_little_text_for_pairs() -> None:
    for few in (ids(1, 12), ids(8, 3)):
        with pytest.raises(DataError, match="at least two windows of seven tokens"):
            MaskedPairs(few, TOKENS)


def bound(model: nn.Module, form: Any = 1.0) -> Term:
    return read_losses({"next_sentence": form})["next_sentence"].bind(model, None, "here")


def test_a_pretraining_models_own_head_is_read() -> None:
    from transformers import BertForPreTraining

    config = bert().config
    model = BertForPreTraining(config).eval()
    batch = MaskedPairs(rows_of_one_token(), TOKENS).batch(torch.arange(6), torch.Generator().manual_seed(0))
    inputs = {name: value for name, value in batch.items() if not name.endswith("labels")}
    logits = model(**inputs).seq_relationship_logits
    term = bound(model)
    assert term.needs == Needs(student_outputs=("cls.seq_relationship",))
    view = View(None, {"cls.seq_relationship": logits})
    term.prepare(view, None, batch)
    assert torch.allclose(term(view, None, batch), F.cross_entropy(logits, batch["next_labels"]))
    assert not list(term.parameters())
    losses = {"next_sentence": 1.0, "cross_entropy": 1.0}
    stage = {"losses": losses, "steps": 2, "batch_size": 4}
    assert distill(model, None, stage, MaskedPairs(rows_of_one_token(), TOKENS)).steps == 2


def test_a_model_without_such_a_head_learns_one_that_is_dropped() -> None:
    from transformers import BertForMaskedLM

    config = bert().config
    config.initializer_range = 0.2  # whether two tokens are the same is slow to learn from small weights
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    names = set(model.state_dict())
    stage = {
        "losses": {"next_sentence": 1.0},
        "steps": 80,
        "batch_size": 32,
        "optimizer": {"lr": 3e-3},
        "schedule": {"kind": "constant", "warmup": 5},
    }
    history = distill(model, None, stage, MaskedPairs(rows_of_one_token(3, 6), TOKENS)).history
    first, last = (sum(e["terms"]["next_sentence"] for e in part) / 5 for part in (history[:5], history[-5:]))
    assert first > 0.6
    assert last < 0.3
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("shape", [(3, 2), (3, 5, 4)])
def test_gradients_by_finite_differences(shape: tuple[int, ...]) -> None:
    term = bound(bert(), {"module": "classifier"})
    output = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    batch = {"next_labels": torch.tensor([0, 1, 1])}
    term.prepare(View(None, {"classifier": output}), None, batch)
    assert torch.autograd.gradcheck(lambda x: term(View(None, {"classifier": x}), None, batch), output)


def test_what_cannot_be_read_is_told() -> None:
    with pytest.raises(StageError, match=r"have no next_labels: use text: \{objective: masked_pairs\}"):
        distill(bert(), None, {"losses": {"next_sentence": 1}, "steps": 1, "batch_size": 4}, ids())
    with pytest.raises(StageError, match="the student has no list of layers"):
        bound(nn.Linear(2, 2))
    term = bound(bert(), {"module": "classifier"})
    with pytest.raises(StageError, match=r"gives \(3, 7\) instead of two classes per row"):
        term.prepare(View(None, {"classifier": torch.zeros(3, 7)}), None, {})
