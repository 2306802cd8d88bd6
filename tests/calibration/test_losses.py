"""The losses that calibrate: right labels in the right places, and the Fisher information from those that are drawn."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdkit
from tdkit.calibration.batches import Call
from tdkit.calibration.calibration import Calibration
from tdkit.calibration.losses import data_loss, sampled_loss
from tdkit.errors import CalibrationError


def language(vocabulary: int = 7) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(vocabulary, 5), nn.Linear(5, vocabulary))
    return model, torch.randint(vocabulary, (3, 8))


def call(*args: object, labels: object = None, passed: bool = False, **kwargs: object) -> Call:
    """A batch; labels that are passed to the model are a keyword argument too."""
    return Call(args, {**kwargs, "labels": labels} if passed else kwargs, labels, passed)


def certain(classes: Tensor, count: int = 7) -> Tensor:
    """Logits that leave no doubt."""
    return 1e4 * F.one_hot(classes, count).float()


def test_drawn_labels_are_what_the_model_is_sure_of() -> None:
    classes = torch.randint(7, (3, 8))
    assert sampled_loss(certain(classes), call(classes), seed=0, causal=True) == 0
    assert sampled_loss(certain(torch.randint(4, (5,)), 4), call(torch.randn(5, 2)), seed=0) == 0
    assert data_loss(certain(classes), call(classes.roll(1, 1)), causal=True) == 0


def test_labels_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(20000, 3).clone().requires_grad_()
    sampled_loss(logits, call(), seed=3).backward()
    drawn = (logits.softmax(-1) - logits.grad).mean(0)  # the gradient is the prediction less the label
    torch.testing.assert_close(drawn, torch.tensor([0.1, 0.2, 0.7]), rtol=0, atol=0.015)


def test_a_draw_depends_on_its_seed_alone() -> None:
    logits = torch.randn(2, 8, 7)
    ids = torch.zeros(2, 8, dtype=torch.long)
    torch.manual_seed(1)
    first = sampled_loss(logits, call(ids), seed=5)
    torch.manual_seed(2)
    assert sampled_loss(logits, call(ids), seed=5) == first
    assert sampled_loss(logits, call(ids), seed=6) != first


def test_only_what_counts_is_drawn() -> None:
    logits = torch.randn(2, 6, 7, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])

    def counted(batch: Call, causal: bool = True) -> list[int]:
        logits.grad = None
        sampled_loss(SimpleNamespace(logits=logits), batch, seed=0, causal=causal).backward()
        return logits.grad.abs().sum(-1).ne(0).sum(1).tolist()

    ids = torch.zeros(2, 6, dtype=torch.long)
    assert counted(call(ids)) == [5, 5]
    assert counted(call(ids), causal=False) == [6, 6]
    assert counted(call(input_ids=ids, attention_mask=mask)) == [3, 5]
    assert counted(call(input_ids=ids, attention_mask=mask), causal=False) == [4, 6]
    assert counted(call(input_ids=ids, labels=ids.masked_fill(mask == 0, -100))) == [4, 6]
    assert counted(call(pixel_values=torch.randn(2, 3))) == [6, 6]


@pytest.mark.parametrize("output", [torch.randn(4, 1), torch.randn(4), "text", SimpleNamespace(loss=torch.ones(()))])
def test_what_has_no_classes_is_refused(output: object) -> None:
    with pytest.raises(CalibrationError, match="no logits of two or more classes to draw labels from"):
        sampled_loss(output, call(), seed=0)


def test_moments_of_drawn_labels_are_the_fisher_information() -> None:
    model, ids = language()
    head = nn.Sequential(model[0], model[1])
    batches = [ids.repeat(400, 1)]
    found = tdkit.calibrate(head, batches, labels="sampled").metric("1")
    assert found is not None
    p = model(ids[:, :-1]).softmax(-1).flatten(0, 1).double()
    fisher = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0) * (7 / 8)  # the last position predicts nothing
    torch.testing.assert_close(found.output, fisher.detach(), rtol=0, atol=0.01)
    real = tdkit.calibrate(head, batches).metric("1")
    assert real is not None
    assert (real.output - fisher).norm() > 5 * (found.output - fisher).norm()


def test_a_calibration_knows_its_labels(tmp_path: Path) -> None:
    model, ids = language()
    calibration = tdkit.calibrate(model, [ids], labels="sampled")
    assert Calibration.load(calibration.save(tmp_path / "moments")).labels == "sampled"
    assert calibration.inputs_only().labels == "sampled"
    first, again = (tdkit.calibrate(model, [ids], labels="sampled").metric("1") for _ in range(2))
    assert first is not None
    assert again is not None
    assert torch.equal(first.output, again.output)


def test_logits_that_are_no_numbers_are_named() -> None:
    model, ids = language()
    model[1].bias.data[0] = float("nan")
    with pytest.raises(CalibrationError, match="the loss of calibration batch 0 is nan"):
        tdkit.calibrate(model, [ids], labels="sampled")


def test_a_file_with_other_labels_is_named(tmp_path: Path) -> None:
    model, ids = language()
    folder = tdkit.calibrate(model, [ids]).save(tmp_path / "moments")
    description = folder / "calibration.json"
    description.write_text(description.read_text().replace('"data"', '"dato"'))
    with pytest.raises(CalibrationError, match=r"calibration\.json is damaged: no labels 'dato'; did you mean 'data'"):
        Calibration.load(folder)


def test_wrong_labels_are_told_before_any_work() -> None:
    model, ids = language()
    with pytest.raises(CalibrationError, match="no labels 'sample'; did you mean 'sampled'"):
        tdkit.calibrate(model, [ids], labels="sample")
    with pytest.raises(CalibrationError, match="loss= has labels of its own: leave out labels='sampled'"):
        tdkit.calibrate(model, [ids], labels="sampled", loss=lambda output, batch: output.sum())


def test_masked_labels_count_nothing_in_the_weight_of_a_batch() -> None:
    """A model's own loss is a mean over its labels, so that it counts for as many of them as there are."""
    own = torch.tensor(2.0)
    labels = torch.full((4, 10), -100)
    labels[:, 3] = 1
    masked = SimpleNamespace(loss=own)
    assert data_loss(masked, call(labels=labels)) == 2.0 * 4
    assert data_loss(masked, call(labels=torch.zeros(5, dtype=torch.long))) == 2.0 * 5
    assert data_loss(masked, call(labels=torch.zeros(5, 2))) == 2.0 * 10
    sequences = SimpleNamespace(loss=own, logits=torch.randn(3, 50, 9))
    assert data_loss(sequences, call(torch.randn(3, 400), labels=torch.ones(3, 7, dtype=torch.long))) == 2.0 * 3


def test_batches_with_labels_weigh_as_their_tokens_do() -> None:
    """The gradients of a causal model's own loss are those of the summed cross-entropy, however much is masked."""
    from tests.conftest import make_gpt2

    model = make_gpt2()
    ids = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 2:] = -100
    labels[2, :7] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(data_loss(output, call(input_ids=ids, labels=labels, passed=True)), expected)
