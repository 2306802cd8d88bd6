"""transformers' Trainer on compressed models: the loss falls, checkpoints are resumed exactly, memory options work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import Kronecker, LowRank, PermutedKronecker, Policy, Rule
from tests.conftest import make_gpt2, make_llama

pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found"),
]

MADE = {
    "gpt2": lambda: make_gpt2(initializer_range=0.1, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "llama": lambda: make_llama(initializer_range=0.1),
}
POLICY = Policy(
    [
        Rule("*mlp*", LowRank(rank=6)),
        Rule("*attn*", Kronecker(terms=2, b=(2, 4))),
        Rule("*", PermutedKronecker(terms=4, b=(4, 2))),  # the embedding and the head that shares it
    ]
)


def made(name: str) -> Any:
    torch.manual_seed(0)
    return tdkit.compress(MADE[name](), POLICY, progress=False)


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Token ids that follow each other."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(12) + index) % 40
        return {"input_ids": ids, "labels": ids}


def trained(model: Any, folder: Path, *, resume: bool = False, **options: Any) -> Any:
    """A Trainer after its training."""
    from transformers import Trainer, TrainingArguments

    given = {"max_steps": 12, "save_steps": 6, "learning_rate": 1e-2, "seed": 0, **options}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **given,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6") if resume else None)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", MADE)
def test_the_loss_falls_and_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    model = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = trained(model, tmp_path)
    found = losses(trainer)
    assert found[-1] < 0.85 * found[0]
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = made(name)
    resumed = trained(again, tmp_path, resume=True)
    assert losses(resumed) == found
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_gradient_checkpointing_changes_no_loss(name: str, reentrant: bool, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "no"}
    expected = losses(trained(made(name), tmp_path, **options))
    checkpointed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert losses(trained(made(name), tmp_path, **options, **checkpointed)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", MADE)
def test_training_in_bf16(name: str, tmp_path: Path) -> None:
    model = made(name)
    found = losses(trained(model, tmp_path, bf16=True, save_strategy="no"))
    assert found[-1] < 0.85 * found[0]
    assert {each.dtype for each in model.parameters()} == {torch.float32}  # autocast computes in bfloat16


def test_a_checkpoint_is_a_folder_of_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = made("llama")
    trained(model, tmp_path, max_steps=6)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    loaded = tdkit.load(tmp_path / "checkpoint-6")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
        assert torch.equal(loaded.state_dict()[key], value), key
    more = losses(trained(again, tmp_path / "more", max_steps=6, save_strategy="no"))
    assert more[-1] < 0.9 * more[0]


def test_adapters_are_trained_and_resumed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from tdkit.models.lora import for_factorized

    def adapted() -> Any:
        model = made("llama")
        return peft.get_peft_model(model, for_factorized(peft.LoraConfig(target_modules="all-linear"), model))

    first = adapted()
    found = losses(trained(first, tmp_path))
    assert found[-1] < 0.9 * found[0]
    files = {file.name for file in (tmp_path / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    assert losses(trained(adapted(), tmp_path, resume=True)) == found


def test_a_tie_survives_training(tmp_path: Path) -> None:
    model = made("llama")
    assert isinstance(model.lm_head, nn.Module)
    trained(model, tmp_path, max_steps=2, save_strategy="no")
    assert model.lm_head.matrix is model.model.embed_tokens.matrix
