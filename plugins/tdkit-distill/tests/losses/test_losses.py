"""Each loss against plain torch on the models' own outputs, and its gradient by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_models import Plain, bert, gpt2, ids, llama
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit_distill.data.examples import Table, Windows
from tdkit_distill.errors import CacheError, StageError
from tdkit_distill.loop.stages import Stage
from tdkit_distill.loop.trainee import Trainee, bind, probe
from tdkit_distill.losses.loss import losses, read_losses
from tdkit_distill.models.calls import call_model
from tdkit_distill.models.taps import tapped
from tdkit_distill.teachers.cache import build_cache
from tdkit_distill.teachers.live import live_teacher

CPU = torch.device("cpu")


def value(student: nn.Module, teacher: nn.Module, losses: dict[str, Any], rows: int = 3, batch: Any = None) -> Tensor:
    """The terms of a stage with these losses on one batch, in eval mode."""
    stage = Stage(losses=losses, steps=1)
    examples = Windows(ids(rows))
    numbers = torch.arange(rows)
    batch = batch or examples.batch(numbers, torch.Generator())
    bound = bind(stage, student, teacher)
    student.eval()
    outputs, attention = bound.gather("student_outputs"), bound.gather("student_attention")
    with live_teacher(
        teacher, outputs=bound.gather("teacher_outputs"), attention=bound.gather("teacher_attention")
    ) as live:
        with live_teacher(student, outputs=outputs, attention=attention) as asked:
            probe(bound.terms, asked, live, Table(batch), 0, CPU)
        with tapped(student, outputs, attention) as record:
            return Trainee(student, list(bound.terms), record, call_model)(batch, live.view(batch, numbers))


def hidden_states(model: nn.Module) -> Any:
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        return model(ids(3), output_hidden_states=True, output_attentions=True)


def test_the_registered_losses_are_the_plugins() -> None:
    assert set(losses.names()) >= {
        "cross_entropy",
        "logits",
        "hidden",
        "embedding",
        "ffn",
        "attention",
        "attention_scores",
        "next_sentence",
        "output",
    }
    assert losses.origins()["logits"] == ["tdkit-distill"]


def test_cross_entropy_is_the_models_own_loss() -> None:
    student = gpt2()
    own = student.eval()(ids(3), labels=ids(3)).loss
    assert torch.allclose(value(student, gpt2(), {"cross_entropy": 1})[0], own)


def test_logits() -> None:
    student, teacher = gpt2(1, seed=1), gpt2()
    expected = F.kl_div(
        F.log_softmax(student.eval()(ids(3)).logits / 2, -1).flatten(0, 1),
        F.softmax(teacher.eval()(ids(3)).logits / 2, -1).flatten(0, 1),
        reduction="batchmean",
    )
    assert torch.allclose(value(student, teacher, {"logits": {"temperature": 2.0}})[0], 4 * expected, atol=1e-7)


def test_hidden_states_of_every_layer() -> None:
    student, teacher = gpt2(3, seed=1), gpt2(3)
    mine, theirs = hidden_states(student).hidden_states, hidden_states(teacher).hidden_states
    # transformers shows the last hidden state after the final norm, so the last layer is left to the next test
    layers = {f"transformer.h.{k}": f"transformer.h.{k}" for k in range(2)}
    expected = sum(F.mse_loss(a, b) for a, b in zip(mine[1:3], theirs[1:3], strict=True))
    assert torch.allclose(value(student, teacher, {"hidden": {"layers": layers}})[0], expected)
    cosine = sum(1 - F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(mine[1:3], theirs[1:3], strict=True)) / 2
    found = value(student, teacher, {"hidden": {"layers": layers, "distance": "cosine", "reduce": "mean"}})[0]
    assert torch.allclose(found, cosine, atol=1e-6)


def test_embedding_and_feed_forward() -> None:
    student, teacher = gpt2(seed=1), gpt2()
    expected = F.mse_loss(student.transformer.wte(ids(3)), teacher.transformer.wte(ids(3)))
    assert torch.allclose(value(student, teacher, {"embedding": 1})[0], expected)
    outputs: dict[str, list[Tensor]] = {"s": [], "t": []}
    for key, model in (("s", student), ("t", teacher)):
        for block in model.transformer.h:
            block.mlp.register_forward_hook(lambda _m, _i, out, key=key: outputs[key].append(out.detach()))
        model.eval()(ids(3))
    expected = sum(F.mse_loss(a, b) for a, b in zip(outputs["s"], outputs["t"], strict=True))
    assert torch.allclose(value(student, teacher, {"ffn": 1})[0], expected)


@pytest.mark.parametrize("build", [gpt2, llama, bert])
def test_attention_distributions(build: Any) -> None:
    student, teacher = build(seed=1).eval(), build().eval()
    found = value(student, teacher, {"attention": 1})[0]
    expected = torch.zeros(())
    for q, p in zip(hidden_states(student).attentions, hidden_states(teacher).attentions, strict=True):
        kl = torch.where(p > 0, p * (p.clamp(min=1e-30).log() - q.clamp(min=1e-30).log()), torch.zeros(())).sum(-1)
        expected = expected + kl.mean()
    assert torch.allclose(found, expected, atol=1e-7)
    assert found > 0


def test_attention_scores_are_the_scaled_products_of_queries_and_keys() -> None:
    student, teacher = gpt2(1, seed=1).eval(), gpt2(1).eval()
    scores = []
    for model in (student, teacher):
        block = model.transformer.h[0]
        x = model.transformer.wte(ids(3)) + model.transformer.wpe(torch.arange(8))
        q, k, _ = block.attn.c_attn(block.ln_1(x)).split(16, dim=-1)
        q, k = (t.reshape(3, 8, 4, 4).transpose(1, 2) for t in (q, k))
        scores.append(q @ k.transpose(-1, -2) / 2)
    seen = torch.ones(8, 8).tril().bool().expand(3, 4, 8, 8)
    expected = F.mse_loss(scores[0][seen], scores[1][seen])
    assert torch.allclose(value(student, teacher, {"attention_scores": 1})[0], expected)


def test_padding_counts_in_no_loss() -> None:
    student, teacher = bert(seed=1), bert()
    every: dict[str, Any] = {"hidden": 1, "embedding": 1, "ffn": 1, "attention": 1, "attention_scores": 1, "logits": 1}
    every |= {"output": 1, "hidden@relative": {"distance": "relative"}}
    short = {"input_ids": ids(3), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    longer = {
        "input_ids": torch.cat([ids(3), ids(3, 4, seed=9)], 1),
        "attention_mask": torch.cat([torch.ones(3, 8), torch.zeros(3, 4)], 1).long(),
    }
    assert torch.allclose(
        value(student, teacher, every, batch=short), value(student, teacher, every, batch=longer), atol=1e-6
    )


@pytest.mark.parametrize(
    "form",
    [
        {"hidden": {"distance": "mse"}},
        {"hidden": {"distance": "cosine"}},
        {"ffn": {"distance": "relative"}},
        {"output": {"distance": "relative"}},
        {"attention": 1},
        {"attention_scores": 1},
        {"embedding": 1},
        {"logits": {"kind": "jensen_shannon"}},
        {"cross_entropy": 1},
    ],
    ids=lambda form: next(iter(form)),
)
def test_gradients_by_finite_differences(form: dict[str, Any]) -> None:
    student, teacher = gpt2(1, 8, seed=1).double(), gpt2(1, 8).double()
    student.requires_grad_(False)
    name, parameter = "transformer.wte.weight", student.transformer.wte.weight[:4].clone()
    full = student.transformer.wte.weight.clone()

    def loss(part: Tensor) -> Tensor:
        weight = torch.cat([part, full[4:]])
        stage = Stage(losses=form, steps=1)
        bound = bind(stage, student, teacher)
        batch = Windows(ids(2, 4) % 4).batch(torch.arange(2), torch.Generator())
        with (
            tapped(student, bound.gather("student_outputs"), bound.gather("student_attention")) as record,
            live_teacher(
                teacher, outputs=bound.gather("teacher_outputs"), attention=bound.gather("teacher_attention")
            ) as live,
        ):
            trainee = Trainee(student, list(bound.terms), record, call_model).eval()
            view = live.view(batch, torch.arange(2))
            return torch.func.functional_call(
                trainee, {f"student.{name}": weight, "student.lm_head.weight": weight}, (batch, view)
            ).sum()

    assert torch.autograd.gradcheck(loss, parameter.requires_grad_(), atol=1e-6)


def test_widths_that_differ_get_a_learned_projection_or_an_error() -> None:
    student, teacher = gpt2(2, 8, seed=1), gpt2(2, 16)
    stage = Stage(losses={"hidden": 1}, steps=1)
    bound = bind(stage, student, teacher)
    with (
        live_teacher(student, outputs=bound.gather("student_outputs")) as asked,
        live_teacher(teacher, outputs=bound.gather("teacher_outputs")) as live,
    ):
        probe(bound.terms, asked, live, Windows(ids(2)), 0, CPU)
    shapes = [tuple(parameter.shape) for term in bound.terms for parameter in term.parameters()]
    assert shapes == [(16, 8), (16, 8)]
    assert torch.isfinite(value(student.double(), teacher.double(), {"hidden": 1})).all(), "in float64 as well"
    student, teacher = student.float(), teacher.float()
    with pytest.raises(StageError, match=r"is 8 wide and 'transformer.h.0' 16: set project: true"):
        value(student, teacher, {"hidden": {"project": False}})


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(StageError, match="loss 'hidden' compares with a teacher, and there is none"):
        bind(Stage(losses={"hidden": 1}, steps=1), gpt2(), None)
    with pytest.raises(StageError, match=r"has 4 heads and 'transformer.h.0.attn' 2"):
        other = gpt2()
        other.transformer.h[0].attn.num_heads = 2
        other.transformer.h[0].attn.head_dim = 8
        value(gpt2(), other, {"attention": 1})
    with pytest.raises(StageError, match="match no module"):
        bind(Stage(losses={"hidden": {"layers": "decoder.*"}}, steps=1), gpt2(), gpt2())


def test_a_cache_keeps_logits_only(tmp_path: Any) -> None:
    cache = build_cache(gpt2(), Windows(ids()), tmp_path, k=4)
    with pytest.raises(CacheError, match="loss 'hidden' looks inside the teacher, but the cache keeps logits only"):
        bind(Stage(losses={"hidden": 1}, steps=1), gpt2(), cache)


def test_faults_of_losses_come_together() -> None:
    with pytest.raises(StageError) as caught:
        read_losses({"logit": 1, "hidden": {"distance": "l1"}, "ffn": {"layer": "all"}})
    text = str(caught.value)
    assert "unknown loss 'logit'; did you mean 'logits'?" in text
    assert "hidden.distance" in text
    assert "ffn.layer: unknown option" in text
    assert list(read_losses({"logits@hot": {"temperature": 4}, "logits@cold": 0.5})) == ["logits@hot", "logits@cold"]


def test_a_model_of_no_library() -> None:
    student, teacher = Plain(2, 6, seed=1), Plain(4)
    with torch.no_grad():
        found = value(student, teacher, {"hidden": 1, "logits": 1, "embedding": {"module": "embed"}})
    assert torch.isfinite(found).all()
