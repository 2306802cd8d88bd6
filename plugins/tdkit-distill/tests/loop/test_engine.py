"""The engine: it learns, does what the stage says, gives everything back, and tells what is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tdkit
import torch
from distill_models import VOCABULARY, Plain, bert, gpt2, ids, llama, same_weights, text

from tdkit_distill import Schedule, Stage, Table, Windows, distill
from tdkit_distill.errors import DistillError, NotFiniteError, StageError, VocabularyError
from tdkit_distill.loop.stages import count_of

LOGITS = {"losses": {"logits": {"temperature": 2.0}}, "steps": 4, "batch_size": 4}
EVERY = {
    "cross_entropy": 1,
    "logits": 1,
    "hidden": 0.5,
    "embedding": 1,
    "ffn": 1,
    "attention": 1,
    "attention_scores": 1,
}


def taught() -> Any:
    teacher = gpt2(2, 32)
    stage = {"losses": {"cross_entropy": 1}, "steps": 60, "batch_size": 16, "optimizer": {"lr": 1e-2}}
    distill(teacher, None, stage, text())
    return teacher


@pytest.mark.parametrize("build", [lambda: gpt2(1, 16, seed=2), lambda: llama(1), lambda: Plain(1, 16)])
def test_a_student_of_any_kind_learns_from_the_teacher(build: Any) -> None:
    student, teacher = build(), taught()
    before = copy.deepcopy(teacher.state_dict())
    held = text(8)
    stage = {**LOGITS, "steps": 80, "batch_size": 16, "optimizer": {"lr": 1e-2}}
    result = distill(student, teacher, stage, text(), held_out=held)
    first, last = result.history[0]["terms"]["logits"], result.history[-2]["terms"]["logits"]
    assert last < 0.3 * first
    assert result.held_out is not None
    assert result.held_out < 2.0 < torch.log(torch.tensor(float(VOCABULARY)))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert result.steps == 80
    assert result.tokens == 80 * 16 * 12


def test_every_loss_at_once_with_differing_depth_and_width() -> None:
    student, teacher = gpt2(2, 8, seed=1), gpt2(4, 16)
    result = distill(student, teacher, {**LOGITS, "losses": EVERY}, text())
    assert set(result.history[0]["terms"]) == set(EVERY)
    weighted = sum(w * result.history[0]["terms"][name] for name, w in EVERY.items())
    assert result.history[0]["loss"] == pytest.approx(weighted)
    assert not any(name.startswith("terms") for name in student.state_dict())


def test_accumulated_parts_make_the_same_step() -> None:
    students = [gpt2(1, seed=1) for _ in range(3)]
    for student, parts in zip(students, (1, 2, 4), strict=True):
        distill(student, gpt2(), {**LOGITS, "accumulation": parts}, text())
    for other in students[1:]:
        for one, two in zip(students[0].parameters(), other.parameters(), strict=True):
            assert torch.allclose(one, two, atol=1e-5)


def test_the_step_is_adamw_as_torch_does_it() -> None:
    """One stage against a plain loop over the same rows."""
    student, teacher, data = gpt2(1, seed=1), gpt2().eval(), text(8)
    plain = copy.deepcopy(student)
    stage = Stage(
        losses={"cross_entropy": 1.0}, steps=5, batch_size=8, clip=0.5, schedule=Schedule(kind="linear", warmup=2)
    )
    result = distill(student, teacher, stage, data)
    matrices = [p for p in plain.parameters() if p.ndim >= 2]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=2.5e-4)
    losses = []
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 2.5e-4 * stage.schedule.factor(step, 5)
        loss = plain(data, labels=data).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert [entry["loss"] for entry in result.history] == pytest.approx(losses, rel=1e-5)
    for one, two in zip(student.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_schedules() -> None:
    cosine = Schedule(kind="cosine", warmup=0.1, floor=0.1)
    factors = [cosine.factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.55)
    assert factors[99] == pytest.approx(0.1, abs=1e-2)
    assert Schedule(kind="linear").factor(25, 100) == pytest.approx(0.75)
    assert Schedule(kind="constant", warmup=5).factor(80, 100) == 1.0


def test_only_the_trainable_part_changes_and_all_is_given_back() -> None:
    student = gpt2(2, 32, seed=1)
    tdkit.compress(student, tdkit.Policy([tdkit.Rule("*.mlp.*", tdkit.LowRank(rank=4))]))
    student.transformer.wpe.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    before = copy.deepcopy(student.state_dict())
    student.eval()
    stages = [
        {**LOGITS, "name": "factors", "trainable": "factors"},
        {**LOGITS, "name": "norms", "trainable": ["norms", "*.c_attn.bias"]},
    ]
    for stage, parts in zip(stages, ((".matrix.",), ("ln_", "c_attn.bias")), strict=True):
        distill(student, gpt2(2, 32), stage, text())
        changed = {name for name, tensor in student.state_dict().items() if not torch.equal(before[name], tensor)}
        assert changed
        assert all(any(part in name for part in parts) for name in changed), changed
        before = copy.deepcopy(student.state_dict())
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
    assert not student.training
    assert all(p.grad is None for p in student.parameters())
    assert sum(len(m._forward_hooks) for m in student.modules()) == 0
    assert student.config.use_cache
    with pytest.raises(StageError, match=r"trainable '\*.mpl.\*' selects no parameter"):
        distill(student, gpt2(2, 32), {**LOGITS, "trainable": "*.mpl.*"}, text())
    with pytest.raises(StageError, match="trainable 'factor' selects no parameter; did you mean 'factors'"):
        distill(student, gpt2(2, 32), {**LOGITS, "trainable": "factor"}, text())


def test_the_same_seed_gives_the_same_student_and_leaves_torchs_own_draws_alone() -> None:
    students = []
    for seed in (0, 0, 1):
        student, teacher = gpt2(1, seed=1, dropout=0.1), gpt2()
        torch.manual_seed(123)
        distill(student, teacher, LOGITS, text(), seed=seed)
        drawn = torch.rand(3)
        torch.manual_seed(123)
        assert torch.equal(drawn, torch.rand(3))
        students.append(student)
    assert same_weights(students[0], students[1])
    assert not same_weights(students[0], students[2])


def test_gradient_checkpointing_and_compilation_change_nothing() -> None:
    students = []
    options: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}, {"compile": "eager"}]
    for running in options:
        student = gpt2(2, seed=1)
        distill(student, gpt2(), {**LOGITS, "losses": EVERY}, text(), running=running)
        students.append(student)
        assert student._compiled_call_impl is None
        assert not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
    for other in students[1:]:
        for one, two in zip(students[0].parameters(), other.parameters(), strict=True):
            assert torch.allclose(one, two, atol=1e-6)


def test_stages_in_order_with_data_of_their_own() -> None:
    table = Table({"input_ids": text(), "labels": text().roll(-1, 1)})
    stages = [{**LOGITS, "name": "one", "data": "a"}, {**LOGITS, "name": "two", "data": "b", "share": 0.1}]
    result = distill(gpt2(1), gpt2(), stages, {"a": Windows(text()), "b": table})
    assert [entry["stage"] for entry in result.history] == ["one"] * 4 + ["two"] * 4
    assert [entry["step"] for entry in result.history] == [1, 2, 3, 4] * 2
    with pytest.raises(StageError, match="data 'c' is none of 'a', 'b'"):
        distill(gpt2(1), gpt2(), {**LOGITS, "data": "c"}, {"a": Windows(text()), "b": table})


def test_tokens_set_the_length() -> None:
    stage = Stage(losses={"cross_entropy": 1}, tokens="1k", batch_size=4)
    assert stage.step_count(12) == 21
    assert distill(gpt2(1), None, stage, text()).steps == 21
    assert count_of("2.5M") == 2_500_000
    for wrong in ({"tokens": 5, "steps": 5}, {}):
        with pytest.raises(StageError, match="give tokens or steps"):
            distill(gpt2(1), None, {"losses": {"cross_entropy": 1}, **wrong}, text())
    with pytest.raises(StageError, match="is no count"):
        distill(gpt2(1), None, {"losses": {"cross_entropy": 1}, "tokens": "many"}, text())


def test_vocabularies_that_differ() -> None:
    with pytest.raises(VocabularyError, match="the student has 40 logits and the teacher 48"):
        distill(gpt2(1, vocabulary=40), gpt2(), LOGITS, text() % 40)


def test_a_loss_that_turns_nan_stops_the_run_with_its_name_and_step(tmp_path: Path) -> None:
    teacher = gpt2()
    student = gpt2(1, seed=1)
    calls = 0

    def call(model: Any, batch: Any) -> Any:
        nonlocal calls
        output = model(batch["input_ids"])
        calls += model is student
        return output.logits * float("nan") if model is student and calls == 5 else output

    stage = {**LOGITS, "losses": {"cross_entropy": 0.0, "logits": 1.0}, "steps": 9}
    with pytest.raises(NotFiniteError, match=r"loss 'cross_entropy' is nan at step 4 .*last good checkpoint is in"):
        distill(student, teacher, stage, text(), folder=tmp_path, running={"checkpoint_every": 3}, call=call)
    assert torch.isfinite(next(student.parameters())).all()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003"]


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(StageError, match="batch_size 4 does not divide into 3 accumulated parts"):
        distill(gpt2(1), gpt2(), {**LOGITS, "accumulation": 3}, text())


def test_faults_of_a_stage_come_together() -> None:
    with pytest.raises(DistillError) as caught:
        distill(gpt2(1), None, {"losses": {"cros_entropy": 1}, "setps": 3, "batch_size": 0}, text())
    assert "did you mean 'cross_entropy'" in str(caught.value)
    assert "setps" in str(caught.value)
    assert "batch_size" in str(caught.value)


def test_a_classifier_through_every_loss() -> None:
    table = Table(
        {"input_ids": ids(), "attention_mask": torch.ones(24, 8, dtype=torch.long), "labels": torch.arange(24) % 2}
    )
    result = distill(bert(1, seed=1), bert(2), {**LOGITS, "losses": EVERY}, table, held_out=table)
    assert all(v >= 0 for v in result.history[0]["terms"].values())
    assert result.held_out is not None
