"""Minimisation of a smooth function of many numbers by limited-memory BFGS with a diagonal scale."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_HALVINGS = 12
SUFFICIENT = 1e-4  # of the decrease that the slope promises (Armijo)
WINDOW = 3  # steps over which progress is judged


@dataclass(frozen=True)
class Minimum:
    """Where the search ended.

    Attributes:
        point: of the least value seen.
        values: after each step, the start's first; never increasing.
        evaluations: of the function.
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
    """Descend from `start` until `WINDOW` steps together gain less than `tolerance` of the value.

    Each step satisfies the Armijo condition, so the values never increase.

    Args:
        function: a point (n,) to its value and gradient.
        start: float32 or float64.
        scale: a guess of the inverse Hessian's diagonal, positive.
        first_step: length of the first trial step along ``-scale * gradient``.
        max_steps: at most so many; 0 returns the start.
        tolerance: relative.
        history: pairs of steps and gradient changes that stand for the inverse Hessian.

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
        for _ in range(MAX_HALVINGS):
            trial = point + length * direction
            trial_value, trial_gradient = function(trial)
            evaluations += 1
            if trial_value <= value + SUFFICIENT * length * slope:
                break
            bend = trial_value - value - slope * length  # the parabola through value, slope and trial value
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
    """The two-loop recursion, started from `scale` times the curvature last seen."""
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
