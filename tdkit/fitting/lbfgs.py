"""Limited-memory BFGS with a diagonal preconditioner and a backtracking line search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_BACKTRACKS = 12  # trial points per line search
SUFFICIENT = 1e-4  # Armijo constant: the least decrease, as a share of what the slope predicts
WINDOW = 3  # steps over which the stopping test measures the decrease


@dataclass(frozen=True)
class Minimum:
    """The result of `minimise`.

    Attributes:
        point: where the function is smallest among the steps taken, (n,).
        values: of the function at the start and after each step; never increasing.
        evaluations: how often the function was called.
    """

    point: Tensor
    values: tuple[float, ...]
    evaluations: int


def minimise(
    function: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,  # (n,)
    *,
    scale: Tensor | None = None,  # (n,)
    first_step: float,
    max_steps: int,
    tolerance: float,
    history: int = 10,
) -> Minimum:
    """Minimise a smooth, non-negative function until `WINDOW` steps decrease it by less than a share `tolerance`.

    Each step satisfies the Armijo condition, so the values never increase.

    Args:
        function: maps a point (n,) to its value and its gradient (n,).
        start: initial point, float32 or float64.
        scale: estimate of the inverse Hessian's diagonal, positive; the identity when None.
        first_step: factor of ``-scale * gradient`` in the first trial step.
        max_steps: upper bound on the steps; 0 returns `start`.
        tolerance: of the stopping test, relative to the value.
        history: how many pairs of steps and gradient differences approximate the inverse Hessian.

    Source: Nocedal and Wright, Numerical Optimization (2006), sections 3.1 and 7.2.
    """
    if scale is not None:
        root = scale.sqrt()

        def scaled(point: Tensor) -> tuple[float, Tensor]:
            value, gradient = function(point * root)
            return value, gradient * root

        found = minimise(
            scaled, start / root, first_step=first_step, max_steps=max_steps, tolerance=tolerance, history=history
        )
        return Minimum(found.point * root, found.values, found.evaluations)
    point = start
    value, gradient = function(point)
    values, evaluations = [value], 1
    memory = _Memory(start, min(history, max_steps))
    while len(values) <= max_steps and value > 0:
        direction = memory.direction(gradient)
        slope = float(gradient @ direction)
        if not slope < 0:
            break
        length = 1.0 if memory.last else first_step
        for _ in range(MAX_BACKTRACKS):
            trial = torch.add(point, direction, alpha=length)
            trial_value, trial_gradient = function(trial)
            evaluations += 1
            if trial_value <= value + SUFFICIENT * length * slope:
                break
            bend = trial_value - value - slope * length  # minimum of the interpolating parabola
            wanted = -slope * length * length / (2 * bend) if bend > 0 else 0.5 * length
            length = min(max(wanted, 0.1 * length), 0.5 * length)
        else:
            break
        memory.add(direction * length, trial_gradient - gradient)
        point, value, gradient = trial, trial_value, trial_gradient
        values.append(value)
        if len(values) > WINDOW and values[-1 - WINDOW] - value < tolerance * value:
            break
    return Minimum(point, tuple(values), evaluations)


class _Memory:
    """The last steps and gradient differences, and their inner products.

    The search direction is computed from the inner products, with few operations on vectors of n entries: for small
    vectors the number of operations is what takes the time.

    Source: Byrd, Nocedal and Schnabel (1994), the compact form; Nocedal and Wright (2006), equation 7.24.
    """

    def __init__(self, like: Tensor, history: int) -> None:
        self.history = history
        self.first, self.last = 0, 0  # the pairs kept are those from `first` up to `last`, oldest first
        self.pairs = like.new_empty(2 * history, 2, len(like))  # step and difference
        self.inverse = np.zeros((2 * history, 2 * history))  # of the products of a step and a difference not older
        self.inner = np.zeros((2 * history, 2 * history))  # products of two differences

    def add(self, step: Tensor, change: Tensor) -> None:
        """Add a pair, and drop the oldest above `history`; a pair that shows no positive curvature is left out."""
        if self.last == len(self.pairs):
            self._move_to_front()
        new, first, last = self.last, max(self.first, self.last + 1 - self.history), self.last + 1
        self.pairs[new, 0], self.pairs[new, 1] = step, change
        products = (self.pairs[first:last].flatten(0, 1) @ change).double().cpu().numpy()
        curvature, square = products[-2:].tolist()
        if curvature > 1e-10 * (float(step @ step) * square) ** 0.5:
            older = slice(first, new)
            self.inverse[older, new] = self.inverse[older, older] @ products[0:-2:2] / -curvature
            self.inverse[new, new] = 1 / curvature
            self.inner[first:last, new] = self.inner[new, first:last] = products[1::2]
            self.first, self.last = first, last

    def direction(self, gradient: Tensor) -> Tensor:
        """The negative gradient times the approximate inverse Hessian."""
        if not self.last:
            return -gradient
        kept = slice(self.first, self.last)
        pairs, inverse, inner = self.pairs[kept].flatten(0, 1), self.inverse[kept, kept], self.inner[kept, kept]
        along = (pairs @ gradient).double().cpu().numpy()
        curvatures = 1 / inverse.diagonal()
        level = float(curvatures[-1] / inner[-1, -1])
        forwards = inverse @ along[0::2]
        weights = np.empty_like(along)
        weights[0::2] = (curvatures * forwards + level * (inner @ forwards - along[1::2])) @ -inverse
        weights[1::2] = level * forwards
        return torch.addmv(gradient, pairs.T, torch.from_numpy(weights).to(pairs), beta=-level)

    def _move_to_front(self) -> None:
        kept, front = slice(self.first, self.last), slice(0, self.last - self.first)
        self.pairs[front] = self.pairs[kept]
        self.inverse[front, front], self.inner[front, front] = self.inverse[kept, kept], self.inner[kept, kept]
        self.first, self.last = front.start, front.stop
