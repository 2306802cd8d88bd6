"""Random float64 tensors and second moments, the same for a seed."""

from __future__ import annotations

import torch
from torch import Tensor


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, seed: int, samples: int | None = None) -> Tensor:
    """The second moment (n, n) of `samples` with unequal, correlated features; singular for samples < n."""
    x = random(samples or 4 * n, n, seed=seed) * torch.arange(1, n + 1, dtype=torch.float64).pow(-1.0)
    x = x @ (torch.eye(n, dtype=torch.float64) + 0.5 * random(n, n, seed=seed + 100))
    return x.T @ x / len(x)
