"""Limited-memory BFGS with a diagonal preconditioner and a backtracking line search."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

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
    scale: Tensor,  # (n,)
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
        scale: estimate of the inverse Hessian's diagonal, positive.
        first_step: factor of ``-scale * gradient`` in the first trial step.
        max_steps: upper bound on the steps; 0 returns `start`.
        tolerance: of the stopping test, relative to the value.
        history: how many pairs of steps and gradient differences approximate the inverse Hessian.

    Source: Nocedal and Wright, Numerical Optimization (2006), algorithms 7.4 and 3.1.
    """
    point = start
    value, gradient = function(point)
    values, evaluations = [value], 1
    memory: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=history)
    while len(values) <= max_steps and value > 0:
        direction = _direction(gradient, memory, scale)
        slope = float(gradient @ direction)
        if not slope < 0:
            break
        length = 1.0 if memory else first_step
        for _ in range(MAX_BACKTRACKS):
            trial = point + length * direction
            trial_value, trial_gradient = function(trial)
            evaluations += 1
            if trial_value <= value + SUFFICIENT * length * slope:
                break
            bend = trial_value - value - slope * length  # minimum of the interpolating parabola
            wanted = -slope * length * length / (2 * bend) if bend > 0 else 0.5 * length
            length = min(max(wanted, 0.1 * length), 0.5 * length)
        else:
            break
        step, change = trial - point, trial_gradient - gradient
        curvature = float(step @ change)
        if curvature > 1e-10 * float(step.norm() * change.norm()):
            memory.append((step, change, 1 / curvature))
        point, value, gradient = trial, trial_value, trial_gradient
        values.append(value)
        if len(values) > WINDOW and values[-1 - WINDOW] - value < tolerance * value:
            break
    return Minimum(point, tuple(values), evaluations)


def _direction(gradient: Tensor, memory: deque[tuple[Tensor, Tensor, float]], scale: Tensor) -> Tensor:
    """The search direction by the two-loop recursion, whose initial inverse Hessian is a multiple of `scale`."""
    direction = -gradient
    weights = []
    for step, change, inverse in reversed(memory):
        weight = inverse * float(step @ direction)
        weights.append(weight)
        direction = torch.add(direction, change, alpha=-weight)
    direction = direction * scale
    if memory:
        _, change, inverse = memory[-1]
        direction = direction / (inverse * float(change @ (scale * change)))
    for (step, change, inverse), weight in zip(memory, reversed(weights), strict=True):
        direction = torch.add(direction, step, alpha=weight - inverse * float(change @ direction))
    return direction
