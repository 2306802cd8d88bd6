"""The metric tr(S (W - What) C (W - What)^T) in which calibrated fits measure their error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.linalg import working

INPUT_FLOOR = 1e-6  # eigenvalues below this share of the largest are lifted to it
OUTPUT_FLOOR = 1e-4


def root_and_inverse(moment: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a moment and its inverse, with small eigenvalues lifted to a floor.

    Args:
        moment: (n, n) positive semi-definite, or (n,) the diagonal of one; float64.
        floor: share of the largest eigenvalue below which eigenvalues are lifted.

    Returns:
        root and inverse root, each of the shape of `moment`. A zero moment gives the identity.
    """
    if moment.ndim == 1:
        top = moment.max()
        values = moment.clamp_min(float(top) * floor) if top > 0 else torch.ones_like(moment)
        return values.sqrt(), values.rsqrt()
    values, vectors = torch.linalg.eigh(moment)
    top = values[-1]
    values = values.clamp_min(float(top) * floor) if top > 0 else torch.ones_like(values)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


@dataclass(frozen=True, eq=False)
class Metric:
    """Second moments of a layer's inputs and output gradients; either may be absent (the identity).

    Attributes:
        input: C = E[x x^T], (in, in), or (in,) when only its diagonal is kept; float64.
        output: S = E[g g^T], (out, out), or (out,) its diagonal (token counts of an embedding); float64.
    """

    input: Tensor | None = None
    output: Tensor | None = None

    def input_root(self) -> tuple[Tensor, Tensor] | None:
        """C^(1/2) and C^(-1/2), floored; None when C is absent."""
        return None if self.input is None else root_and_inverse(working(self.input), INPUT_FLOOR)

    def output_root(self) -> tuple[Tensor, Tensor] | None:
        """S^(1/2) and S^(-1/2), floored; None when S is absent."""
        return None if self.output is None else root_and_inverse(working(self.output), OUTPUT_FLOOR)

    def squared_error(self, difference: Tensor) -> float:
        """tr(S D C D^T) for D = W - What, (out, in)."""
        return float(
            (times_left(self.output, working(difference)) * times_right(working(difference), self.input)).sum()
        )

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """sqrt(tr(S D C D^T) / tr(S W C W^T)), the metric's counterpart of the relative Frobenius error."""
        size = self.squared_error(weight)
        gap = self.squared_error(working(weight) - working(approximation))
        return float((gap / size) ** 0.5) if size > 0 else float(max(gap, 0.0) ** 0.5)


def times_left(moment: Tensor | None, matrix: Tensor) -> Tensor:
    """``moment @ matrix`` where the moment may be absent or a diagonal."""
    if moment is None:
        return matrix
    moment = moment.to(matrix)
    return moment[:, None] * matrix if moment.ndim == 1 else moment @ matrix


def times_right(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """``matrix @ moment`` where the moment may be absent or a diagonal."""
    if moment is None:
        return matrix
    moment = moment.to(matrix)
    return matrix * moment if moment.ndim == 1 else matrix @ moment
