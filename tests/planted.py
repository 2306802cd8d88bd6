"""Matrices with a planted permuted sum of Kronecker products, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.fitting.linalg import nearest_kronecker, relative_error, restore
from tdkit.shapes import Shape

Factors = Callable[[int, Shape, torch.Generator], Tensor]


@dataclass(frozen=True)
class Planted:
    """A shuffled sum of Kronecker products plus noise, and the error of the fit in the original order."""

    matrix: Tensor  # (out, in) float64
    error: float  # relative


def gaussian(terms: int, shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(terms, *shape, generator=generator, dtype=torch.float64)


def non_negative(terms: int, shape: Shape, generator: torch.Generator) -> Tensor:
    return gaussian(terms, shape, generator).abs()


def orthogonal(terms: int, shape: Shape, generator: torch.Generator) -> Tensor:
    tall = (max(shape), min(shape))
    factors = torch.linalg.qr(gaussian(terms, tall, generator))[0]
    return factors if shape == tall else factors.mT


def rank_two(terms: int, shape: Shape, generator: torch.Generator) -> Tensor:
    return gaussian(terms, (shape[0], 2), generator) @ gaussian(terms, (2, shape[1]), generator)


def repeated(terms: int, shape: Shape, generator: torch.Generator) -> Tensor:
    factors = gaussian(terms, shape, generator)
    factors[:, 1] = factors[:, 0]
    factors[:, :, 1] = factors[:, :, 0]
    return factors


def signs(terms: int, shape: Shape, generator: torch.Generator) -> Tensor:
    return gaussian(terms, shape, generator).sign()


def plant(
    a: Shape, b: Shape, *, terms: int = 1, noise: float = 0.0, seed: int = 0, factors: Factors = gaussian
) -> Planted:
    """``sum_r A_r kron B_r + noise`` with shuffled rows and columns.

    Args:
        noise: norm of the noise divided by that of the sum.
    """
    generator = torch.Generator().manual_seed(seed)
    upper, lower = factors(terms, a, generator), factors(terms, b, generator)
    clean = restore(upper.flatten(1).T @ lower.flatten(1), a, b)
    disturbance = gaussian(1, (clean.shape[0], clean.shape[1]), generator)[0]
    noisy = clean + disturbance * (noise * clean.norm() / disturbance.norm())
    left, right = nearest_kronecker(noisy, a, b, terms)
    error = relative_error(noisy, restore(left.flatten(1).T @ right.flatten(1), a, b))
    rows = torch.randperm(len(noisy), generator=generator)
    columns = torch.randperm(noisy.shape[1], generator=generator)
    return Planted(noisy[rows][:, columns].contiguous(), error)
