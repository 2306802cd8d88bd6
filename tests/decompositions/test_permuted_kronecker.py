"""`PermutedKronecker` recovers hidden orders and is never worse than `Kronecker`."""

from __future__ import annotations

import pytest
import torch

from tdkit import Kronecker, PermutedKronecker
from tdkit.errors import OptionError
from tdkit.fitting.linalg import relative_error
from tdkit.shapes import Shape
from tests.planted import plant


@pytest.mark.parametrize(("a", "b"), [((16, 16), (16, 16)), ((24, 48), (32, 64))], ids=str)
def test_a_shuffled_kronecker_product_is_recovered_exactly(a: Shape, b: Shape) -> None:
    weight = plant(a, b).matrix
    matrix = PermutedKronecker(terms=1, a=a, b=b).fit(weight)
    assert relative_error(weight, matrix.dense()) < 1e-6


def test_several_shuffled_products_are_recovered_exactly() -> None:
    weight = plant((16, 24), (16, 24), terms=3).matrix
    matrix = PermutedKronecker(terms=3, a=(16, 24), b=(16, 24)).fit(weight)
    assert relative_error(weight, matrix.dense()) < 1e-6


@pytest.mark.parametrize(("rows", "cols"), [(True, True), (True, False), (False, True), (False, False)])
def test_fast_paths_equal_the_dense_matrix(rows: bool, cols: bool) -> None:
    weight = torch.randn(18, 20, dtype=torch.float64)
    matrix = PermutedKronecker(terms=2, a=(3, 5), b=(6, 4), rows=rows, cols=cols).fit(weight)
    dense = matrix.dense()
    x, ids = torch.randn(7, 20, dtype=torch.float64), torch.tensor([0, 17, 3])
    torch.testing.assert_close(matrix.matmul(x), x @ dense.T)
    torch.testing.assert_close(matrix.rows(ids), dense[ids])
    assert matrix.indices == 18 * rows + 20 * cols


@pytest.mark.parametrize("terms", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_never_worse_than_kronecker(terms: int, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 36, dtype=dtype)
    options = {"terms": terms, "a": (4, 6), "b": (6, 6)}
    permuted = relative_error(weight, PermutedKronecker(**options).fit(weight).dense())  # type: ignore[arg-type]
    plain = relative_error(weight, Kronecker(**options).fit(weight).dense())  # type: ignore[arg-type]
    assert permuted <= plain + torch.finfo(dtype).eps


def test_bad_options_are_told() -> None:
    with pytest.raises(OptionError, match="rows='yes' must be true or false"):
        PermutedKronecker(terms=1, rows="yes")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="seed=-1 must be an integer"):
        PermutedKronecker(terms=1, seed=-1)
