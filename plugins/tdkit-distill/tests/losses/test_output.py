"""The loss on what models return, against plain torch, and which tensors of an output it finds."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit_distill import distill
from tdkit_distill.errors import StageError, VocabularyError

Named = namedtuple("Named", ["mean", "scale"])


@dataclass
class Fields:
    mean: Tensor
    scale: Tensor


class Returns(nn.Module):
    """Returns what `form` makes of two tensors (n, width) and (n, 2, 3)."""

    def __init__(self, form: Any, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mean, self.scale = nn.Linear(4, width), nn.Linear(4, 6)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.mean(x), self.scale(x).reshape(-1, 2, 3))


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(7))


def terms(form: Any, options: Any, width: int = 5) -> float:
    student, teacher = Returns(form, 1), Returns(form, 2, width)
    stage = {"losses": {"output": options}, "steps": 1, "batch_size": 6}
    loss: float = distill(student, teacher, stage, X, running={"device": "cpu"}).history[0]["loss"]
    return loss


def pair(form: Any) -> tuple[Any, Any]:
    with torch.no_grad():
        return Returns(form, 1)(X), Returns(form, 2)(X)


FORMS: dict[str, tuple[Any, list[str]]] = {
    "tuple": (lambda mean, scale: (mean, scale), ["0", "1"]),
    "nested": (lambda mean, scale: [0, (mean, [scale])], ["1.0", "1.1.0"]),
    "mapping": (lambda mean, scale: {"mean": mean, "scale": scale}, ["mean", "scale"]),
    "named tuple": (Named, ["mean", "scale"]),
    "dataclass": (Fields, ["mean", "scale"]),
    "mapping of tuples": (lambda mean, scale: {"both": (mean, scale)}, ["both.0", "both.1"]),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_named_tensors_of_any_output(name: str, reduce: str) -> None:
    form, paths = FORMS[name]
    (mean, scale), (target_mean, target_scale) = pair(lambda *both: both)
    expected = F.mse_loss(mean, target_mean) + F.mse_loss(scale, target_scale)
    found = terms(form, {"tensors": paths, "reduce": reduce})
    assert found == pytest.approx(float(expected) / (2 if reduce == "mean" else 1))
    assert terms(form, {"tensors": paths[1]}) == pytest.approx(float(F.mse_loss(scale, target_scale)))


def test_distances() -> None:
    for form in (
        lambda mean, _: mean,
        lambda _, scale: scale,
        lambda mean, _: mean[:, :, None, None].expand(-1, 5, 2, 2),
    ):
        found, target = pair(form)
        assert terms(form, 1) == pytest.approx(float(F.mse_loss(found, target)))
        ratios = [float((a - b).norm() ** 2 / b.norm() ** 2) for a, b in zip(found, target, strict=True)]
        assert terms(form, {"distance": "relative"}) == pytest.approx(sum(ratios) / 6)
    found, target = pair(lambda mean, _: mean)
    cosine = float((1 - F.cosine_similarity(found, target, dim=-1)).mean())
    assert terms(lambda mean, _: mean, {"distance": "cosine"}) == pytest.approx(cosine)


def test_the_predictions_are_found_or_asked_for() -> None:
    (mean, _), (target, _) = pair(lambda *both: both)
    expected = pytest.approx(float(F.mse_loss(mean, target)))
    for form in (
        lambda mean, _: mean,
        lambda mean, scale: (mean, scale),
        lambda mean, scale: {"logits": mean, "scale": scale},
        lambda mean, _: {"embedding": mean},
    ):
        assert terms(form, 1) == expected
    with pytest.raises(StageError, match=r"the model returns a dict with 'mean', 'scale': say which, tensors=\[NAME\]"):
        terms(FORMS["mapping"][0], 1)
    with pytest.raises(StageError, match="without a floating-point tensor 'men'; it has mean, scale"):
        terms(FORMS["mapping"][0], {"tensors": "men"})
    with pytest.raises(StageError, match="returns a tuple without a floating-point tensor '2'"):
        terms(FORMS["tuple"][0], {"tensors": "2"})
    with pytest.raises(StageError, match="without a floating-point tensor 'mean'"):
        terms(lambda mean, _: {"mean": mean.argmax(-1)}, {"tensors": "mean"})
    with pytest.raises(StageError, match="tensors is empty"):
        terms(lambda mean, _: mean, {"tensors": []})


def test_outputs_of_other_shapes_or_of_no_rows() -> None:
    match = r"the output of the student has the shape \(1, 5\) for one row, and the output of the teacher \(1, 7\)"
    with pytest.raises(StageError, match=match):
        terms(lambda mean, _: mean, 1, width=7)
    with pytest.raises(StageError, match="'0' of the output of the student"):
        terms(lambda mean, scale: (mean, scale), {"tensors": ["1", "0"]}, width=7)
    with pytest.raises(StageError, match=r"over the first dimension of which relative is a mean: use mse"):
        terms(lambda _, scale: scale.transpose(0, 1), {"distance": "relative"})
    with pytest.raises(StageError, match=r"has the shape \(1, 6, 5\) for a batch of 6 rows"):
        terms(lambda mean, _: mean.unsqueeze(0), {"distance": "relative"})
    assert terms(lambda _, scale: scale.transpose(0, 1), 1) > 0


def test_logits_of_images_have_their_classes_in_the_second_dimension() -> None:
    def form(mean: Tensor, _: Tensor) -> Tensor:
        return mean[:, :, None, None] + torch.arange(6.0).reshape(2, 3)

    student, teacher = pair(form)
    labels = torch.arange(36).reshape(6, 2, 3) % 5
    stage = {"losses": {"logits": 1, "cross_entropy": 1}, "steps": 1, "batch_size": 6}
    models = Returns(form, 1), Returns(form, 2)
    columns = {"x": X, "label": labels}
    (entry,) = distill(*models, stage, columns, running={"device": "cpu"}).history
    expected = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True) / 36
    assert entry["terms"]["logits"] == pytest.approx(float(expected), rel=1e-5)
    assert entry["terms"]["cross_entropy"] == pytest.approx(float(F.cross_entropy(student, labels)), rel=1e-5)
    resized = Returns(lambda mean, _: mean[:, :, None, None].expand(-1, 5, 4, 4), 2)
    with pytest.raises(
        StageError, match=r"the student has logits of shape \(1, 2, 3, 5\) for one row, and the teacher"
    ):
        distill(Returns(form, 1), resized, {**stage, "losses": {"logits": 1}}, X)


def test_models_of_unlike_classes_can_be_compared_without_their_logits() -> None:
    form = FORMS["mapping"][0]
    stage = {"losses": {"output": {"tensors": "scale"}}, "steps": 1}
    student, teacher = Returns(lambda mean, scale: {"logits": mean, "scale": scale}, 1), Returns(form, 2, 7)
    assert distill(student, teacher, stage, X).history[0]["loss"] > 0
    with pytest.raises(VocabularyError, match="the student has 5 logits and the teacher 7"):
        distill(
            Returns(lambda mean, _: mean), Returns(lambda mean, _: mean, width=7), {**stage, "losses": {"logits": 1}}, X
        )
