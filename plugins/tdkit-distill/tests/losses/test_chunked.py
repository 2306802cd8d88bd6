"""Divergences and cross-entropy in chunks: against plain formulas, by gradcheck, and at the sizes they are for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tdkit_distill.losses import chunked
from tdkit_distill.losses.chunked import cross_entropy, divergence, top_logits

KINDS = ["forward_kl", "reverse_kl", "jensen_shannon", "mse"]


def reference(student: torch.Tensor, teacher: torch.Tensor, kind: str, temperature: float) -> torch.Tensor:
    if kind == "mse":
        return F.mse_loss(student, teacher)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    if kind == "forward_kl":
        rows = (p * (p.log() - q.log())).sum(-1)
    elif kind == "reverse_kl":
        rows = (q * (q.log() - p.log())).sum(-1)
    else:
        m = (p + q) / 2
        rows = ((p * (p.log() - m.log())).sum(-1) + (q * (q.log() - m.log())).sum(-1)) / 2
    return rows.mean() * temperature**2


def pair(rows: int = 7, size: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, size, dtype=torch.float64, requires_grad=True), torch.randn(
        rows, size, dtype=torch.float64
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 33, 1 << 22])
def test_divergence_is_its_formula_in_chunks_of_any_size(
    kind: str, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
    student, teacher = pair()
    found = divergence(student, teacher, kind=kind, temperature=temperature)
    expected = reference(student, teacher, kind, temperature)
    assert torch.allclose(found, expected)
    assert torch.allclose(*(torch.autograd.grad(loss, student)[0] for loss in (found, expected)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 1, 4, 11])
def test_gradcheck(kind: str, top_k: int | None) -> None:
    student, teacher = pair()
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, kind=kind, temperature=1.7, top_k=top_k), student)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_top_k_is_the_divergence_of_the_kept_tokens_and_the_rest(kind: str) -> None:
    student, teacher = pair()
    kept = teacher.topk(4).indices

    def coarse(logits: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1)
        inside = p.gather(-1, kept)
        return torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], -1).log()

    expected = reference(coarse(student), coarse(teacher), kind, 1.0)
    assert torch.allclose(divergence(student, teacher, kind=kind, top_k=4), expected)
    assert 0 < expected < reference(student, teacher, kind, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_all_logits_as_top_logits_are_the_plain_divergence(kind: str) -> None:
    student, teacher = pair()
    kept = top_logits(teacher, 11, temperature=2.0)
    assert torch.allclose(
        divergence(student, kept, kind=kind, temperature=2.0), divergence(student, teacher, kind=kind, temperature=2.0)
    )


def test_cross_entropy_leaves_out_rows_without_label() -> None:
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -100, 2, 4, -100, 1, 1, 3, 0])
    assert torch.allclose(cross_entropy(logits, labels), F.cross_entropy(logits, labels))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), logits)
    assert float(cross_entropy(logits, torch.full((9,), -100)).detach()) == 0.0


def test_half_precision_logits_are_compared_in_float32() -> None:
    student = torch.randn(6, 300).bfloat16().requires_grad_()
    teacher = torch.randn(6, 300).bfloat16()
    loss = divergence(student, teacher, temperature=2.0)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, reference(student.float(), teacher.float(), "forward_kl", 2.0), rtol=1e-5)
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_no_full_copy_of_the_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that forward and backward make, besides the gradient, is one chunk."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 4 * 5000)
    student, teacher = torch.randn(64, 5000, requires_grad=True), torch.randn(64, 5000)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            shares = func is torch.ops.aten.detach.default  # a view, of which torch 2.8 names no base
            if isinstance(out, torch.Tensor) and out._base is None and not shares:
                sizes.append(out.numel())
            return out

    with Watch():
        divergence(student, teacher, kind="jensen_shannon").backward()
    full = [size for size in sizes if size >= student.numel()]
    assert len(full) <= 2, "the gradient and, at most, its accumulation"
    assert sorted(sizes)[-len(full) - 1] <= 4 * 5000
