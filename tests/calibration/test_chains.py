"""Sequential fits of models of many kinds: which blocks follow each other, and what they are fitted on."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.calibration.calibration import shrunk
from tdkit.compression import jobs
from tdkit.compression.fit import fit_step
from tdkit.errors import CalibrationError
from tdkit.fitting.metric import Metric
from tdkit.models.sites import Site
from tdkit.planning.step import Step
from tests.tasks import TASKS, cnn, images

POLICY = Policy([Rule("re:(?!.*relative_attention_bias).*", LowRank(rank=2))])

# Layers whose inputs depend on the blocks before their own only.
FIRST = {
    "bert": ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.2.attention.self.value"],
    "t5": [
        "encoder.block.1.layer.0.SelfAttention.q",
        "encoder.block.1.layer.1.DenseReluDense.wi",
        "decoder.block.0.layer.1.EncDecAttention.k",  # the output of the compressed encoder
        "decoder.block.1.layer.2.DenseReluDense.wi",
    ],
    "bart": ["model.encoder.layers.1.self_attn.q_proj", "model.decoder.layers.1.encoder_attn.k_proj"],
    "whisper": ["model.encoder.layers.1.self_attn.q_proj", "model.decoder.layers.2.encoder_attn.k_proj"],
    "wav2vec2": ["wav2vec2.encoder.layers.2.attention.q_proj"],
    "vit": ["vit.layers.1.attention.q_proj", "vit.layers.2.attention.k_proj"],
    "resnet": ["classifier.1"],
    "cnn": ["6", "8"],
}

EARLIER = {  # names of transformers 5.0
    "vit.layers.1.attention.q_proj": "vit.encoder.layer.1.attention.attention.query",
    "vit.layers.2.attention.k_proj": "vit.encoder.layer.2.attention.attention.key",
}


def metrics_used(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The metric that each site is fitted in, by site name; filled in by a sequential fit."""
    used: dict[str, Metric | None] = {}

    def noted(step: Step, site: Site, metric: Metric | None, device: None) -> Any:
        used[site.name] = metric
        return fit_step(step, site, metric, device)

    monkeypatch.setattr(jobs, "fit_step", noted)
    return used


@pytest.mark.parametrize("name", sorted(TASKS))
def test_each_block_is_fitted_on_what_the_compressed_blocks_before_it_give(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = TASKS[name]()
    used = metrics_used(monkeypatch)
    tdkit.compress(model, POLICY, calibration=batches, sequential=True, progress=False)
    assert set(used) == {step.name for step in tdkit.applied_plan(model).rewritten}
    for layer in (layer if layer in used else EARLIER[layer] for layer in FIRST[name]):
        metric = used[layer]
        assert metric is not None
        assert metric.input is not None
        expected = input_moment(model, layer, batches)
        torch.testing.assert_close(metric.input, expected, rtol=1e-4, atol=1e-6)


def input_moment(model: nn.Module, layer: str, batches: list[Any]) -> Tensor:
    """E[x x^T] of the inputs of a layer in the model as it is now, shrunk as for a fit."""
    rows: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: rows.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch[0])
    handle.remove()
    x = torch.cat([row.flatten(0, -2) for row in rows])
    moment = shrunk(Metric(x.T @ x / len(x)), len(x)).input
    assert moment is not None
    return moment


def test_padding_counts_nothing_in_a_sequential_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = TASKS["bert"]()
    for batch in batches:
        batch["attention_mask"][:, 8:] = 0
        batch["labels"][:, 8:] = -100
    used = metrics_used(monkeypatch)
    tdkit.compress(model, POLICY, calibration=batches, sequential=True, progress=False)
    short = [{key: value[:, :8].contiguous() for key, value in batch.items()} for batch in batches]
    name = "bert.encoder.layer.2.attention.self.query"
    torch.testing.assert_close(used[name].input, input_moment(model, name, short), rtol=1e-4, atol=1e-6)


class Beside(nn.Module):
    """A chain of blocks, and a smaller list of layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.chain = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.chain(self.side[0](x) + self.side[1](x))
        return y


def test_a_smaller_list_that_is_no_chain_is_fitted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = Beside(), [torch.randn(9, 6) for _ in range(2)]
    loss = lambda output, _: output.square().sum()  # noqa: E731
    with caplog.at_level(logging.WARNING, "tdkit"):
        tdkit.compress(model, POLICY, calibration=batches, loss=loss, sequential=True)
    assert len(tdkit.applied_plan(model).rewritten) == 5
    assert "side.0, ... are fitted with the inputs of the dense model" in caplog.text
    assert "side.1 does not take what side.0 returned" in caplog.text


def test_a_block_that_is_called_twice_is_told() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.blocks[1](self.blocks[0](self.blocks[0](x)))
            return y

    model = Repeated()
    with pytest.raises(CalibrationError, match=r"blocks\.1 is not called once, after the blocks before it"):
        tdkit.compress(
            model, POLICY, calibration=[torch.randn(4, 6)], loss=lambda y, _: y.square().sum(), sequential=True
        )
    assert isinstance(model.blocks[0], nn.Linear)


def test_batches_stay_as_they_are_when_blocks_work_in_place() -> None:
    model, _ = cnn()
    batches = [images(16) for _ in range(2)]
    before = [batch[0].clone() for batch in batches]
    tdkit.compress(nn.Sequential(nn.ReLU(), *model), POLICY, calibration=batches, sequential=True)
    assert all(torch.equal(batch[0], x) for batch, x in zip(batches, before, strict=True))
