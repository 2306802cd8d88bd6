"""Row losses over a large vocabulary, a few rows at a time, so that no full extra copy of the logits exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from tdkit_distill.data.examples import IGNORED
from tdkit_distill.models.view import TopLogits

CHUNK_ELEMENTS = 1 << 22  # logits of one chunk: 16 MiB in float32

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon", "mse"]
RowLoss = Callable[[Tensor, int, int], Tensor]  # (student rows start..stop, start, stop) -> (stop - start,)


def top_logits(
    logits: Tensor,  # (rows, vocabulary)
    k: int,
    temperature: float = 1.0,
) -> TopLogits:
    """The `k` largest logits of each row with the log-partition of all of them."""
    k = min(k, logits.shape[-1])
    values, indices = logits.topk(k, dim=-1)
    partition = torch.logsumexp(_working(logits) / temperature, dim=-1)
    return TopLogits(values, indices, partition, temperature, logits.shape[-1])


def divergence(
    student: Tensor,  # (rows, vocabulary) logits
    teacher: Tensor | TopLogits,  # (rows, vocabulary) logits, or the largest of them
    *,
    kind: Divergence = "forward_kl",
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """The mean divergence of softmax(teacher / T) and softmax(student / T) over rows, times T^2.

    Forward KL is KL(teacher || student), reverse KL the other way round, Jensen-Shannon the mean of both
    to their even mixture; ``mse`` is the mean squared difference of the raw logits, without temperature.
    With `top_k` both distributions keep the teacher's k most likely tokens and put all others together
    as one more outcome, which keeps a true divergence; at k = vocabulary it is the plain one. Computed in
    float32 (float64 for float64), whatever the dtype.

    Sources: Hinton, Vinyals and Dean (2015), section 2; Gu et al., MiniLLM (2024), for reverse KL.
    """
    if top_k is not None and isinstance(teacher, Tensor) and top_k < teacher.shape[-1]:
        with torch.no_grad():
            pieces = [
                top_logits(teacher[start:stop], top_k, temperature)
                for start, stop in _spans(len(teacher), teacher.shape[-1])
            ]
            teacher = TopLogits(
                torch.cat([p.values for p in pieces]),
                torch.cat([p.indices for p in pieces]),
                torch.cat([p.log_partition for p in pieces]),
                temperature,
                teacher.shape[-1],
            )

    def rows(part: Tensor, start: int, stop: int) -> Tensor:
        # clones: a tensor made in inference mode cannot be kept for a backward
        if isinstance(teacher, Tensor):
            return _dense_rows(part, teacher[start:stop].clone(), kind, temperature)
        return _top_rows(part, teacher.rows(start, stop), kind, temperature)

    return _mean_of_rows(student, rows)


def cross_entropy(
    logits: Tensor,  # (rows, classes)
    labels: Tensor,  # (rows,); IGNORED where there is none
) -> Tensor:
    """The mean of -log softmax(logits)[label] over the rows that have a label; 0 when none has."""
    count = (labels != IGNORED).sum().clamp(min=1)

    def rows(part: Tensor, start: int, stop: int) -> Tensor:
        return F.cross_entropy(_working(part), labels[start:stop].clone(), ignore_index=IGNORED, reduction="none")

    return _mean_of_rows(logits, rows) * (len(logits) / count)


def _dense_rows(student: Tensor, teacher: Tensor, kind: Divergence, temperature: float) -> Tensor:
    if kind == "mse":
        return (_working(student) - _working(teacher)).square().mean(-1)
    log_s = F.log_softmax(_working(student) / temperature, dim=-1)
    log_t = F.log_softmax(_working(teacher) / temperature, dim=-1)
    return _between(log_s, log_t, kind) * temperature**2


def _top_rows(student: Tensor, teacher: TopLogits, kind: Divergence, temperature: float) -> Tensor:
    indices = teacher.indices.long()
    values = _working(teacher.values.clone())
    if kind == "mse":
        return (_working(student).gather(-1, indices) - values).square().mean(-1)
    log_s = F.log_softmax(_working(student) / temperature, dim=-1).gather(-1, indices)
    log_t = values / temperature - _working(teacher.log_partition.clone()).unsqueeze(-1)
    if indices.shape[-1] < teacher.vocabulary:
        log_s = torch.cat([log_s, _log_of_rest(log_s)], dim=-1)
        log_t = torch.cat([log_t, _log_of_rest(log_t)], dim=-1)
    return _between(log_s, log_t, kind) * temperature**2


def _log_of_rest(log_kept: Tensor) -> Tensor:
    """log(1 - sum of the kept probabilities), (rows, 1)."""
    rest = 1 - log_kept.exp().sum(-1, keepdim=True)
    return rest.clamp(min=torch.finfo(log_kept.dtype).eps).log()


def _between(log_s: Tensor, log_t: Tensor, kind: Divergence) -> Tensor:
    """Divergence of two rows of log-probabilities, (rows,)."""
    if kind == "forward_kl":
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if kind == "reverse_kl":
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0, dtype=log_s.dtype, device=log_s.device))
    return 0.5 * ((log_s.exp() * (log_s - log_m)).sum(-1) + (log_t.exp() * (log_t - log_m)).sum(-1))


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _spans(rows: int, columns: int) -> list[tuple[int, int]]:
    size = max(1, CHUNK_ELEMENTS // max(columns, 1))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _mean_of_rows(logits: Tensor, rows: RowLoss) -> Tensor:
    mean: Tensor = _MeanOfRows.apply(logits, rows)  # type: ignore[no-untyped-call]
    return mean


class _MeanOfRows(torch.autograd.Function):
    """The mean of a row loss; only the logits are kept, and the backward computes each chunk again."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, rows: RowLoss) -> Tensor:
        ctx.save_for_backward(logits)
        cast(Any, ctx).rows = rows
        total = torch.zeros((), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        total = total.to(logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            for start, stop in _spans(*logits.shape):
                total += rows(logits[start:stop], start, stop).sum()
        return total / max(len(logits), 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
            for start, stop in _spans(*logits.shape):
                part = logits[start:stop].detach().requires_grad_()
                (piece,) = torch.autograd.grad(ctx.rows(part, start, stop).sum(), part)
                gradient[start:stop] = piece * (slope / len(logits))
        return gradient, None
