"""Low-rank fits in a calibrated metric, in closed form: whiten both sides, truncate, undo the whitening."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.fitting.linalg import leading, truncated, working
from tdkit.fitting.metric import Metric, root_and_inverse, times_left, times_right
from tdkit.support.threads import threads_for


def truncated_in_metric(weight: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """The rank-`rank` matrix What = left @ right that minimises tr(S (W - What) C (W - What)^T), for W = `weight`.

    What = S^(-1/2) U U^T S^(1/2) W, where U holds the leading eigenvectors of S^(1/2) W C W^T S^(1/2). That is the
    truncated SVD of S^(1/2) W C^(1/2) multiplied by the inverse roots. Only the root of the smaller side's moment is
    computed. Each factor gets the square roots of the singular values.

    Args:
        weight: (out, in), or a stack (members, out, in) whose members are approximated each; any float dtype.
        rank: 1 <= rank <= min(out, in).
        metric: S and C; with neither, the fit is that of the Frobenius norm.

    Returns:
        left (out, rank) and right (rank, in), or (members, out, rank) and (members, rank, in); float64.

    Sources: Eckart and Young (1936); input whitening, Wang et al., SVD-LLM (2024), section 3.1.
    """
    weight = working(weight)
    if metric.input is None and metric.output is None:
        return truncated(weight, rank)
    with threads_for(weight.numel()):
        gram = _whitened_gram(weight, metric)
        vectors, squares = leading(gram.matrix, rank)
    tiny = torch.finfo(squares.dtype).tiny
    level = (squares.maximum(squares[..., :1] * 1e-16 + tiny) ** 0.25)[..., None, :]
    out = times_left(gram.inverse, vectors) * level
    kept = times_left(gram.root, vectors) / level
    if gram.transposed:
        return weight @ kept, out.mT
    return out, kept.mT @ weight


def squared_singular_values(weight: Tensor, metric: Metric) -> Tensor:
    """The squared singular values of S^(1/2) W C^(1/2), descending, float64.

    Args:
        weight: (\\*members, out, in).

    Returns:
        (\\*members, min(out, in)).
    """
    with threads_for(weight.numel()):
        values: Tensor = torch.linalg.eigvalsh(_whitened_gram(working(weight), metric).matrix)
    return values.flip(-1).clamp_min(0)


@dataclass(frozen=True)
class _WhitenedGram:
    """The Gram matrix R X X^T R of the whitened weight, on the smaller side of W.

    X is W (or its transpose) times a root of the other side's moment.
    """

    matrix: Tensor
    root: Tensor | None  # R, the root of the smaller side's moment; None for the identity
    inverse: Tensor | None
    transposed: bool


def _whitened_gram(weight: Tensor, metric: Metric) -> _WhitenedGram:
    transposed = weight.shape[-2] > weight.shape[-1]
    near, far = metric.ridged_output(), metric.ridged_input()
    if transposed:
        weight, near, far = weight.mT, far, near
    root, inverse = root_and_inverse(near.to(weight.device)) if near is not None else (None, None)
    gram = times_right(weight, far) @ weight.mT
    gram = times_right(times_left(root, gram), root)
    return _WhitenedGram((gram + gram.mT) / 2, root, inverse, transposed)
