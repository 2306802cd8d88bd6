"""The contract finds what is wrong: each decomposition here breaks one clause and fails its check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

from tdkit import Decomposition, FactorizedMatrix, LowRank, Metric
from tdkit.products.cost import Path, Product
from tdkit.shapes import Shape
from tdkit.testing import check_decomposition, checks

SHAPE = (12, 18)


class ScaledMatrix(FactorizedMatrix):
    """left right, by `dense` alone, as a plugin may write it."""

    def __init__(self, decomposition: Decomposition, shape: Shape, rank: int) -> None:
        super().__init__(decomposition, shape)
        self.left = nn.Parameter(torch.empty(shape[0], rank, dtype=torch.float64))
        self.right = nn.Parameter(torch.empty(rank, shape[1], dtype=torch.float64))

    def dense(self) -> Tensor:
        return self.left @ self.right


class WithoutBias(ScaledMatrix):
    def multiply(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor:
        return self.matmul(x)


class StaleCache(ScaledMatrix):
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.left,)


class WrongPath(ScaledMatrix):
    def paths(self, tokens: int) -> tuple[Path, ...]:
        return (*super().paths(tokens), Path("doubled", (Product(10**9, 10**9, 1),)))

    def multiply(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor:
        y = super().multiply(x, bias, path)
        return 2 * y if path.name == "doubled" else y


class OnTheCpu(ScaledMatrix):
    def dense(self) -> Tensor:
        return self.left @ self.right * torch.ones(())  # a number on the CPU goes with every device


class LostGradient(ScaledMatrix):
    def multiply(self, x: Tensor, bias: Tensor | None, path: Path) -> Tensor:
        y = x @ self.right.T @ self.left.detach().T + 0 * self.left.sum()
        return y if bias is None else y + bias


@dataclass(frozen=True, kw_only=True)
class Broken(Decomposition):
    """A low-rank decomposition whose matrix is `kind`."""

    name: ClassVar[str] = "broken"
    kind: type[ScaledMatrix] = ScaledMatrix
    rank: int | None = None

    def candidates(self, shape: Shape) -> list[Self]:
        return [type(self)(kind=self.kind, rank=rank) for rank in range(1, min(shape) + 1)]

    def empty(
        self, shape: Shape, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FactorizedMatrix:
        assert self.rank is not None
        return self.kind(self, shape, self.rank).to(device, dtype)

    def fit(self, weight: Tensor, metric: Metric | None = None) -> FactorizedMatrix:
        matrix = self.empty((weight.shape[0], weight.shape[1]), dtype=weight.dtype)
        assert self.rank is not None
        fitted = LowRank(rank=self.rank).fit(weight, self.moments(metric))
        matrix.load_state_dict(fitted.state_dict())
        return matrix

    def moments(self, metric: Metric | None) -> Metric | None:
        return metric


@dataclass(frozen=True, kw_only=True)
class Ignores(Broken):
    def moments(self, metric: Metric | None) -> Metric | None:
        return None


@dataclass(frozen=True, kw_only=True)
class IgnoresGradients(Broken):
    def moments(self, metric: Metric | None) -> Metric | None:
        return None if metric is None or metric.input is None else Metric(input=metric.input)


@dataclass(frozen=True, kw_only=True)
class Reverses(Broken):
    def moments(self, metric: Metric | None) -> Metric | None:
        if metric is None or metric.input is None:
            return metric
        moments = metric.input if metric.input.ndim == 2 else metric.input.diag()
        return Metric(input=torch.linalg.inv(moments), output=metric.output)


def run(kind: Decomposition, clause: str, **options: object) -> None:
    """The checks of one clause for one shape."""
    found = [check for check in checks(kind, shapes=[SHAPE], **options) if check.name.startswith(f"{clause}[")]
    assert found, f"there is no {clause}"
    for check in found:
        check()


@pytest.mark.parametrize("clause", ["linear_is_dense", "every_path_is_dense", "matmul_is_dense", "gradients_are_right"])
def test_a_plugin_that_only_writes_dense_passes(clause: str) -> None:
    run(Broken(), clause)


@pytest.mark.parametrize(
    ("kind", "clause", "message"),
    [
        (WithoutBias, "linear_is_dense", r"in training: linear of a batch \(\) with bias is off"),
        (StaleCache, "linear_is_dense", r"prefer=speed, under no_grad, after a factor was changed in place"),
        (WrongPath, "every_path_is_dense", r"path 'doubled' of 1 tokens is off"),
        (OnTheCpu, "products_stay_on_the_device", r"on meta makes tensors on \['cpu', 'meta'\]"),
        (LostGradient, "every_path_is_dense", r"path 'dense' of 1 tokens: a gradient is off"),
    ],
)
def test_a_wrong_product_is_found(kind: type[ScaledMatrix], clause: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run(Broken(kind=kind), clause)


def test_what_a_fit_makes_of_the_metric_is_checked_as_it_is_claimed() -> None:
    run(Broken(), "metric_is_used", metric="used")
    run(Ignores(), "metric_is_ignored", metric="ignored")
    for kind in (Broken(), Ignores(), IgnoresGradients()):
        run(kind, "metric_does_no_harm")
    with pytest.raises(AssertionError, match=r"makes no use of C: .* calibrated, .* plain"):
        run(Ignores(), "metric_is_used", metric="used")
    with pytest.raises(AssertionError, match=r"makes no use of S of half rank"):
        run(IgnoresGradients(), "metric_is_used", metric="used")
    with pytest.raises(AssertionError, match=r"makes use of C$"):
        run(Broken(), "metric_is_ignored", metric="ignored")
    with pytest.raises(AssertionError, match=r"with C: .* calibrated, .* plain"):
        run(Reverses(), "metric_does_no_harm")


def test_every_failure_is_reported_together() -> None:
    with pytest.raises(AssertionError, match=r"checks failed:\n") as raised:
        check_decomposition(Ignores(), shapes=[SHAPE], dtypes=[torch.float64], metric="used")
    assert "metric_is_used[12x18]: AssertionError: broken(" in str(raised.value)
    assert "bad_options_are_told" in str(raised.value)
    assert "linear_is_dense" not in str(raised.value)
