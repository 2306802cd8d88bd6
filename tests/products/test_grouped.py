"""The product of rows with the matrices of their groups by torch's own call, where torch has one for them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tdkit.products.grouped import grouped_product

COUNTS = (4, 0, 3)


def looped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:4] @ weight[0].T, x[4:] @ weight[2].T])


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch before 2.10 has no grouped_mm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_loop(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 8, dtype=dtype), torch.randn(3, 16, 8, dtype=dtype)
    y = grouped_product(x, weight, COUNTS)
    assert y is not None
    torch.testing.assert_close(y, looped(x, weight))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(7, 8).double(), torch.randn(3, 16, 8).double()),
        (torch.randn(7, 7), torch.randn(3, 16, 7)),
        (torch.randn(7, 8), torch.randn(3, 15, 8)),
        (torch.randn(7, 8), torch.randn(3, 16, 8).bfloat16()),
        (torch.randn(8, 7).T, torch.randn(3, 16, 8)),
        (torch.randn(57)[1:].view(7, 8), torch.randn(3, 16, 8)),
        (torch.randn(0, 8), torch.randn(3, 16, 8)),
        (torch.randn(4, 8), torch.randn(3, 16, 8)),
        (torch.randn(7, 8, requires_grad=True), torch.randn(3, 16, 8)),
    ],
    ids=["float64", "odd in", "odd out", "two dtypes", "transposed", "not aligned", "no rows", "few rows", "gradients"],
)
def test_what_torch_does_not_take_is_left_to_the_loop(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert grouped_product(x, weight, {7: COUNTS, 4: (2, 0, 2), 0: (0, 0, 0)}[len(x)]) is None
