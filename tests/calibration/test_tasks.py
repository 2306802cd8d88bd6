"""Calibration of models of many kinds on the batches that people have, with the default loss and with their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tdkit
from tdkit import Calibration, LowRank, Policy, Rule
from tdkit.errors import CalibrationError
from tests.conftest import make_gpt2
from tests.tasks import TASKS, tokens

POLICY = Policy([Rule("*", LowRank(rank=2))])


def summed(output: Any, batch: Any) -> Tensor:
    """The summed cross-entropy of the labels of a batch, at the positions of the logits."""
    labels = batch["labels"] if isinstance(batch, dict) else batch[1]
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def same(one: Calibration, other: Calibration) -> None:
    assert one.names == other.names
    assert one.names
    for name in one.names:
        for ours, theirs in zip(*(vars(each.metric(name)).values() for each in (one, other)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"wav2vec2"}))
def test_the_default_loss_is_the_cross_entropy_of_the_labels(name: str) -> None:
    model, batches = TASKS[name]()
    same(tdkit.calibrate(model, batches), tdkit.calibrate(model, batches, loss=summed))


def test_connectionist_temporal_classification_sums_over_the_examples() -> None:
    model, batches = TASKS["wav2vec2"]()
    assert model.config.ctc_loss_reduction == "sum"
    same(tdkit.calibrate(model, batches), tdkit.calibrate(model, batches, loss=lambda output, _: output.loss))
    model.config.ctc_loss_reduction = "mean"
    same(tdkit.calibrate(model, batches), tdkit.calibrate(model, batches, loss=lambda output, _: output.loss * 2))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_compress_and_plan_take_the_batches(name: str) -> None:
    model, batches = TASKS[name]()
    planned = tdkit.plan(model, POLICY, calibration=batches)
    tdkit.compress(model, POLICY, calibration=batches)
    assert [step.name for step in tdkit.applied_plan(model).rewritten] == [step.name for step in planned.rewritten]
    batch = batches[0]
    with torch.no_grad():
        output = model(**batch) if isinstance(batch, dict) else model(batch[0])
    assert (output if isinstance(output, Tensor) else output.logits).isfinite().all()


def mlp(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, outputs))


def test_a_loader_of_inputs_and_classes() -> None:
    model, x, y = mlp(), torch.randn(10, 5), torch.randint(3, (10,))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    expected = tdkit.calibrate(
        model, [{"input": x}], loss=lambda output, _: F.cross_entropy(output, y, reduction="sum")
    )
    same(tdkit.calibrate(model, loader), expected)
    same(tdkit.calibrate(model, [{"input": x, "labels": y}]), expected)
    same(tdkit.calibrate(model, [({"input": x}, y)]), expected)


def test_a_loader_of_inputs_and_values() -> None:
    model, x, y = mlp(), torch.randn(10, 5), torch.randn(10, 3)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    same(
        tdkit.calibrate(model, loader),
        tdkit.calibrate(model, [x], loss=lambda output, _: (output - y).square().sum()),
    )


@dataclass
class Output:
    scores: Tensor
    count: int = 0


class Wrapped(nn.Module):
    """Returns its logits in the way asked for."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = mlp()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, y.sum()),
        lambda y: [y],
        lambda y: {"out": y},
        lambda y: {"logits": y, "hidden": y + 1, "loss": None},
        lambda y: Output(y),
        lambda y: (Output(y), 3),
    ],
)
def test_outputs_of_any_form(wrap: Callable[[Tensor], Any]) -> None:
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    same(tdkit.calibrate(Wrapped(wrap), [(x, y)]), tdkit.calibrate(Wrapped(lambda y: y), [(x, y)]))


def test_a_loss_that_the_model_returns_first() -> None:
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = mlp()

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            logits = self.inner(x)
            return F.cross_entropy(logits, labels), logits

    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    model = Training()
    found = tdkit.calibrate(model, [(x, y)])
    same(found, tdkit.calibrate(model, [(x, y)], loss=lambda output, batch: output[0] * 6))


def test_classes_in_the_second_dimension() -> None:
    model, x, y = nn.Sequential(nn.Linear(5, 5)), torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    same(
        tdkit.calibrate(model, [(x, y)]),
        tdkit.calibrate(model, [x], loss=lambda output, _: F.cross_entropy(output, y, reduction="sum")),
    )


X = torch.randn(4, 5)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (mlp(), X, r"there are no labels, and the model is no causal language model.*as \(inputs, labels\)"),
        (mlp(), (X, torch.tensor([0, 1, 2, 3])), "label 3 is none of the 3 classes"),
        (mlp(), (X, torch.zeros(4, 2).long()), r"output of shape \(4, 3\) has no logits for labels of shape \(4, 2\)"),
        (mlp(1), (X, torch.zeros(4).long()), r"torch.int64 and an output of shape \(4, 1\) are no choice of one"),
        (mlp(1), (X, torch.randn(4)), r"labels of shape \(4,\) do not have the shape of the output, \(4, 1\): reshape"),
        (mlp(1), (X, torch.zeros(4, 1)), r"all 0 or 1 can be classes \(binary cross-entropy\) or values"),
        (mlp(), (X, "a"), "the labels of a batch are a str, not a tensor"),
        (mlp(5), (torch.randn(2, 5, 5), torch.zeros(2, 5).long()), "can be its second or its last dimension"),
        (Wrapped(lambda y: {"a": y, "b": y}), (X, torch.zeros(4).long()), "a dict with a, b and no 'logits'"),
        (Wrapped(lambda y: {"last_hidden_state": y}), (X, torch.zeros(4).long()), "returns last_hidden_state, and no"),
        (Wrapped(lambda y: "text"), (X, torch.zeros(4).long()), "returns a str with no floating-point tensor"),
    ],
)
def test_what_the_loss_is_is_not_guessed(model: nn.Module, batch: Any, message: str) -> None:
    good = (X, torch.zeros(4).long())
    with pytest.raises(CalibrationError, match=rf"(?s)calibration batch 0: .*{message}"):
        tdkit.calibrate(model, [batch, good])
    with pytest.raises(CalibrationError, match=r"give loss=\(output, batch\) -> scalar|is none of"):
        tdkit.compress(model, Policy([Rule("*", LowRank(rank=1))]), calibration=[batch])
    assert not any(isinstance(module, tdkit.FactorizedMatrix) for module in model.modules())


def test_compress_and_plan_take_the_loss_that_an_error_advises() -> None:
    model, batches = mlp(), [X]

    def loss(output: Tensor, _: Any) -> Tensor:
        return output.square().sum()

    calibration = tdkit.calibrate(model, batches, loss=loss)
    policy = Policy([Rule("*", LowRank())], budget=0.8)
    assert tdkit.plan(model, policy, calibration=batches, loss=loss) == tdkit.plan(
        model, policy, calibration=calibration
    )
    tdkit.compress(model, policy, calibration=batches, loss=loss, sequential=True, passes=2)
    with pytest.raises(CalibrationError, match=r"loss= is for the batches of calibration=, and there are none"):
        tdkit.plan(mlp(), policy, loss=loss)
    with pytest.raises(CalibrationError, match=r"has been measured with a loss already: give batches, or leave it out"):
        tdkit.compress(mlp(), policy, calibration=calibration, loss=loss)
    with pytest.raises(CalibrationError, match="the loss function returned a float, not a scalar tensor"):
        tdkit.calibrate(mlp(), batches, loss=lambda output, _: 1.0)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", ["bert", "bart"])
@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_labels_that_are_needed_are_asked_for(name: str, labels: Any) -> None:
    model, batches = TASKS[name]()
    bare = [{"input_ids": batch["input_ids"]} for batch in batches]
    if name == "bart":
        with pytest.raises(
            CalibrationError, match="encoder-decoder, and a batch has neither labels nor decoder_input_"
        ):
            tdkit.calibrate(model, bare, labels=labels)
        with_inputs = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in bare]
        with pytest.raises(CalibrationError, match="there are no labels, and the model is no causal language model"):
            tdkit.calibrate(model, with_inputs)
        assert tdkit.calibrate(model, with_inputs, gradients=False).names
        return
    if labels == "data":
        with pytest.raises(CalibrationError, match="there are no labels, and the model is no causal language model"):
            tdkit.calibrate(model, bare)
        return
    assert tdkit.calibrate(model, bare, labels="sampled").names


def test_the_next_tokens_are_the_labels_of_a_causal_model() -> None:
    model, ids = make_gpt2(), [tokens() for _ in range(2)]
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    bare = tdkit.calibrate(model, ids)
    handle.remove()
    assert len(calls) == 5  # two to find whether it is causal, one to find what the batches reach, one for each batch
    same(bare, tdkit.calibrate(model, [{"input_ids": batch, "labels": batch} for batch in ids]))
    with pytest.raises(CalibrationError, match=r"calibration batch 1: .*can be the labels or 'past_key_values'"):
        tdkit.calibrate(model, [ids[0], (ids[0], ids[0])])


def test_a_model_of_text_and_images_has_positions_of_both() -> None:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text, vision = {"vocab_size": 60, "max_position_embeddings": 12}, {"image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **vision})).eval()
    batch = {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 8, 8), "return_loss": True}
    found = tdkit.calibrate(model, [batch])  # twelve tokens, and five positions of an image
    same(found, tdkit.calibrate(model, [batch], loss=lambda output, _: output.loss * 2))  # a mean over two examples


def test_padding_of_an_encoder_is_no_padding_of_the_decoder() -> None:
    """A mask of the encoder's tokens says nothing of as many tokens of the decoder."""
    model, _ = TASKS["t5"]()
    ids, labels = tokens(length=6), tokens(length=6)
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    name = "decoder.block.0.layer.0.SelfAttention.q"
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = tdkit.calibrate(model, [batch], names=[name]).metric(name)
    rows: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0].double()))
    model(**batch)
    handle.remove()
    x = rows[0].flatten(0, 1).detach()
    torch.testing.assert_close(found.input, x.T @ x / len(x), rtol=1e-5, atol=1e-8)
