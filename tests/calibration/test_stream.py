"""Calibration of a model in files: the moments are those of the model in memory, with a block in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tdkit
from tdkit import Calibration, calibrate_folder
from tdkit.calibration.runner import Runner
from tdkit.calibration.stream import calibrate_opened
from tdkit.errors import CalibrationError, SourceError
from tdkit.models.on_disk import OnDisk
from tdkit.sources.models import load_model
from tdkit.sources.on_disk import open_model
from tests.conftest import make_gpt2, make_llama
from tests.tasks import TASKS

CHAINS = ["bert", "resnet", "vit", "wav2vec2"]  # of TASKS
OTHERS = {"t5": "several lists of blocks", "bart": "several lists of blocks", "whisper": "several lists of blocks"}


def text(rows: int = 3) -> list[torch.Tensor]:
    return [torch.randint(0, 60, (2, 16)) for _ in range(rows)]


def check_equal(found: Calibration, expected: Calibration) -> None:
    assert set(found.names) == set(expected.names)
    assert found.rows == pytest.approx(expected.rows)
    for name in expected.names:
        ours, theirs = found.metric(name), expected.metric(name)
        assert ours is not None
        assert theirs is not None
        for a, b in ((ours.input, theirs.input), (ours.output, theirs.output)):
            assert (a is None) == (b is None), name
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12, msg=name)


def both(model: Any, batches: list[Any], folder: Path, **options: Any) -> tuple[Calibration, Calibration]:
    """The moments from files and in memory."""
    model.save_pretrained(folder)
    expected = tdkit.calibrate(load_model(str(folder)).model, batches, **options)
    return calibrate_folder(folder, batches, **options, progress=False), expected


@pytest.mark.parametrize(
    "options",
    [{}, {"gradients": False}, {"labels": "sampled"}, {"limit_bytes": 20_000}],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize("tied", [True, False])
def test_moments_are_those_of_the_model_in_memory(tied: bool, options: dict[str, Any], tmp_path: Path) -> None:
    check_equal(*both(make_llama(tie_word_embeddings=tied), text(), tmp_path, **options))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_models_of_other_kinds(name: str, gradients: bool, tmp_path: Path) -> None:
    check_equal(*both(*TASKS[name](), tmp_path, gradients=gradients))


def test_padding_and_labels(tmp_path: Path) -> None:
    model, batches = TASKS["bert"]()
    for batch in batches:
        batch["attention_mask"][:, 8:] = 0
        batch["labels"][:, 8:] = -100
    check_equal(*both(model, batches, tmp_path))


def test_a_loss_and_some_layers(tmp_path: Path) -> None:
    def loss(output: Any, _: Any) -> torch.Tensor:
        return output.logits.square().sum()

    names = ["transformer.h.1.mlp.c_fc", "transformer.h.3.attn.c_attn"]
    found, expected = both(make_gpt2(), text(), tmp_path, loss=loss, names=names)
    assert sorted(found.names) == names
    check_equal(found, expected)


def test_it_is_saved_and_leaves_no_other_files(tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path / "model")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = calibrate_folder(tmp_path / "model", text(), tmp_path / "moments", scratch=scratch)
    check_equal(Calibration.load(tmp_path / "moments"), found)
    assert list(scratch.iterdir()) == []
    with pytest.raises(CalibrationError, match="exists"):
        calibrate_folder(tmp_path / "model", text(), tmp_path / "moments")


def test_no_more_than_one_block_and_its_surroundings_are_in_memory(tmp_path: Path) -> None:
    model = make_llama(num_hidden_layers=8, vocab_size=60)
    model.save_pretrained(tmp_path)
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    outside = whole - 8 * block
    opened = open_model(tmp_path)
    runner = Runner(opened.model, gradients=True, device=torch.device("cpu"))
    calibrate_opened(opened, runner, text())
    assert opened.weights.held_bytes == 0
    assert opened.weights.peak_bytes == block + outside
    assert block + outside < 3 * block


def test_the_random_state_stays(tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    calibrate_folder(tmp_path, [torch.zeros(1, 8, dtype=torch.int64)], labels="sampled")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_models_that_are_no_chain_are_told(name: str, tmp_path: Path) -> None:
    model, batches = TASKS[name]()
    model.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=rf"{OTHERS[name]}.*load the model and calibrate it in memory"):
        calibrate_folder(tmp_path, batches)


def with_embeddings(plain: Any, again: bool) -> Any:
    """A forward whose output also depends on the embeddings: looked up again after the blocks, or kept from before."""

    def forward(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        kept: list[torch.Tensor] = []
        table = self.model.embed_tokens
        handle = table.register_forward_hook(lambda *call: kept.append(call[2]))
        output = plain(self, input_ids, **options)
        handle.remove()
        output.logits = output.logits + (table(input_ids) if again else kept[0]).sum(-1, keepdim=True)
        return output

    return forward


def test_a_way_around_the_blocks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    make_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "forward", with_embeddings(LlamaForCausalLM.forward, again=False))
    with pytest.raises(CalibrationError, match=r"depends on more than what model\.layers\.1 returns"):
        calibrate_folder(tmp_path, text())


def test_a_layer_that_is_used_on_both_sides_of_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "forward", with_embeddings(LlamaForCausalLM.forward, again=True))
    check_equal(*both(make_llama(tie_word_embeddings=False), text(), tmp_path))


def test_arguments_that_blocks_compute_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose argument is what the block before it left there."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    plain, left = LlamaDecoderLayer.forward, [torch.zeros(())]

    def leaving(self: Any, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        options["position_ids"] = None
        found = plain(self, hidden_states, *args, **options)
        left[0] = found.detach().mean()
        return found

    make_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", leaving)
    opened = open_model(tmp_path)
    for layer in opened.model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "extra": left[0].clone()}), with_kwargs=True
        )
    runner = Runner(opened.model, gradients=True, device=torch.device("cpu"))
    with pytest.raises(CalibrationError, match=r"model\.layers\.[01] takes an argument that the blocks before it"):
        calibrate_opened(opened, runner, text())


def test_wrong_calls_are_told(tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="no model 'nowhere/at-all'"):
        calibrate_folder("nowhere/at-all", text())
    with pytest.raises(CalibrationError, match="there are no calibration batches"):
        calibrate_folder(tmp_path, [])
    with pytest.raises(CalibrationError, match="labels of its own"):
        calibrate_folder(tmp_path, text(), labels="sampled", loss=lambda output, _: output.logits.sum())


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    batches = text()
    expected = tdkit.calibrate(load_model(str(tmp_path)).model, batches)
    found = calibrate_folder(tmp_path, batches, device="cuda")
    for name in expected.names:
        ours, theirs = found.metric(name), expected.metric(name)
        torch.testing.assert_close(ours.input, theirs.input, rtol=1e-3, atol=1e-5)


def test_a_plain_module_is_brought_and_taken_away(tmp_path: Path) -> None:
    model = make_gpt2()
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path, dtype=torch.float32)
    assert isinstance(opened.weights, OnDisk)
    ids = torch.randint(0, 60, (2, 7))
    with opened.weights.brought(opened.model.modules()), torch.no_grad():
        assert torch.equal(opened.model(ids).logits, model(ids).logits)
    assert all(parameter.is_meta for parameter in opened.model.parameters())
