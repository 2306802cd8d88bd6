"""oneDNN's product: equal to torch's own, used only where it may be, and only where it has won."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tdkit import LowRank, TTMatrix
from tdkit.products import onednn
from tdkit.products.cost import CACHED
from tdkit.support.compatibility import onednn_has_linear, onednn_linear

LARGE = (64, 256, 512)  # rows of x, columns and rows of a matrix for which oneDNN is asked

pytestmark = pytest.mark.skipif(not onednn_has_linear(), reason="this build of torch has no oneDNN")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of x of every product that oneDNN does from now on."""
    seen: list[int] = []
    product = onednn.onednn_linear

    def count(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return product(x, matrix, bias)

    monkeypatch.setattr(onednn, "onednn_linear", count)
    return seen


@pytest.fixture
def products(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The same, with the trial won, whatever this machine is."""
    monkeypatch.setattr(onednn, "faster", lambda: True)
    return counted


@pytest.fixture
def untried() -> Iterator[None]:
    """The trial is still to be made, and forgotten afterwards."""
    onednn.faster.cache_clear()
    yield
    onednn.faster.cache_clear()


def case(size: tuple[int, int, int] = LARGE) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    n, columns, rows = size
    return torch.randn(n, columns), torch.randn(rows, columns), torch.randn(rows)


@settings(deadline=None)
@given(
    n=st.sampled_from([0, 1, 16, 37]),
    columns=st.sampled_from([1, 3, 16, 97]),
    rows=st.sampled_from([1, 5, 32, 101]),
    by_columns=st.booleans(),
    biased=st.booleans(),
)
def test_it_is_the_same_product(n: int, columns: int, rows: int, by_columns: bool, biased: bool) -> None:
    x, matrix, bias = case((n, columns, rows))
    matrix = matrix.T.contiguous().T if by_columns else matrix
    given_bias = bias if biased else None
    with torch.inference_mode():
        y = onednn_linear(x, matrix, given_bias)
    torch.testing.assert_close(y, F.linear(x, matrix, given_bias), rtol=1e-4, atol=1e-4)


def test_it_is_used_for_large_products_of_any_batch(products: list[int]) -> None:
    x, matrix, bias = case()
    with torch.inference_mode():
        torch.testing.assert_close(onednn.linear(x, matrix, bias), F.linear(x, matrix, bias), rtol=1e-4, atol=1e-4)
        batched = onednn.linear(x.view(2, 32, -1), matrix.T.contiguous().T, bias)
        torch.testing.assert_close(batched, F.linear(x.view(2, 32, -1), matrix, bias), rtol=1e-4, atol=1e-4)
    assert products == [64, 64]


def test_a_small_product_is_torchs(products: list[int]) -> None:
    x, matrix, bias = case()
    with torch.inference_mode():
        onednn.linear(x[:15], matrix[:500], bias[:500])
        assert products == []
        onednn.linear(x, matrix[:500], bias[:500])
        onednn.linear(x[:1], matrix, bias)
        onednn.linear(x[:1], matrix.T.contiguous().T, bias)  # by columns: slower for one row
    assert products == [64, 1]


@pytest.mark.parametrize(
    ("x", "matrix"),
    [
        (torch.randn(64, 512)[:, ::2], torch.randn(512, 256)),
        (torch.randn(64, 256), torch.randn(512, 300)[:, :256]),
        (torch.randn(64, 256, dtype=torch.float64), torch.randn(512, 256, dtype=torch.float64)),
        (torch.randn(64, 256, dtype=torch.bfloat16), torch.randn(512, 256, dtype=torch.bfloat16)),
    ],
    ids=["x with gaps", "a matrix with gaps", "float64", "bfloat16"],
)
def test_what_it_is_slow_for_or_cannot_do_is_torchs(products: list[int], x: Tensor, matrix: Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(onednn.linear(x, matrix), F.linear(x, matrix))
    assert products == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func's own
def test_gradients_and_autocast_are_torchs(products: list[int]) -> None:
    x, matrix, bias = case()
    x.requires_grad_()
    onednn.linear(x, matrix, bias).sum().backward()
    torch.testing.assert_close(x.grad, matrix.sum(0).expand(64, -1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        tangent = torch.func.jvp(lambda x: onednn.linear(x, matrix), (x.detach(),), (x.detach(),))[1]
    torch.testing.assert_close(tangent, x.detach() @ matrix.T, rtol=1e-4, atol=1e-4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert onednn.linear(x, matrix, bias).dtype == torch.bfloat16
    assert products == []


def test_a_wrong_size_is_torchs_error(products: list[int]) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        onednn.linear(torch.randn(64, 255), torch.randn(512, 256))
    assert products == []


def test_compiled_code_has_none_of_it(products: list[int]) -> None:
    x, matrix, bias = case()
    compiled = torch.compile(onednn.linear, fullgraph=True, backend="eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x, matrix, bias), F.linear(x, matrix, bias))
    assert products == []


def test_both_paths_of_a_matrix_use_it(products: list[int]) -> None:
    matrix = LowRank(rank=37).empty((512, 256)).eval()
    for factor in matrix.parameters():
        torch.nn.init.normal_(factor)
    x, bias = torch.randn(512, 256), torch.randn(512)
    with torch.inference_mode():
        expected = F.linear(x, matrix.dense(), bias)
        for prefer in ("memory", "speed"):
            matrix.dispatcher.configure(prefer)
            products.clear()
            torch.testing.assert_close(matrix.linear(x, bias), expected, rtol=1e-4, atol=1e-3)
            assert products, prefer


@pytest.mark.parametrize("wins", [True, False])
def test_a_cached_weight_lies_by_rows_where_onednn_reads_it(monkeypatch: pytest.MonkeyPatch, wins: bool) -> None:
    monkeypatch.setattr(onednn, "faster", lambda: wins)
    matrix = TTMatrix(ranks=64).empty((768, 256)).eval()
    for factor in matrix.parameters():
        torch.nn.init.normal_(factor, std=0.1)
    matrix.dispatcher.configure("speed")
    assert matrix.path(1).name == CACHED
    x = torch.randn(1, 256)
    with torch.inference_mode():
        torch.testing.assert_close(matrix.linear(x), x @ matrix.dense().T, rtol=1e-4, atol=1e-4)
        weight = matrix.dispatcher.cached_weight(matrix)
    assert weight is not None
    assert weight.is_contiguous() is wins


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("by_rows", "by_columns", "wins"),
    [(0.9, 0.9, True), (1.0, 1.0, False), (0.96, 0.9, False), (0.9, 0.96, False), (2.0, 0.1, False)],
)
def test_the_trial_is_won_by_clearly_less_time_in_both_layouts(
    monkeypatch: pytest.MonkeyPatch, by_rows: float, by_columns: float, wins: bool
) -> None:
    """The times are given here, of oneDNN as a share of those of torch; the first round is slow and does not count."""
    rounds = iter(range(4 * onednn.ROUNDS))

    def seconds(call: partial[Tensor]) -> float:
        call()
        _, matrix, _ = call.args
        share = (by_rows if matrix.is_contiguous() else by_columns) if call.func is not F.linear else 1.0
        return 100.0 if next(rounds) < 4 else share

    monkeypatch.setattr(onednn, "_seconds", seconds)
    assert onednn.faster() is wins
    assert next(rounds, None) is None


@pytest.mark.usefixtures("untried")
def test_the_trial_is_made_once(counted: list[int]) -> None:
    decided = onednn.faster()
    assert counted == [64] * 2 * onednn.ROUNDS
    assert onednn.faster() is decided
    assert len(counted) == 2 * onednn.ROUNDS


@pytest.mark.usefixtures("untried")
def test_a_build_without_it(monkeypatch: pytest.MonkeyPatch, counted: list[int]) -> None:
    monkeypatch.setattr(onednn, "onednn_has_linear", lambda: False)
    x, matrix, bias = case()
    with torch.inference_mode():
        assert torch.equal(onednn.linear(x, matrix, bias), F.linear(x, matrix, bias))
    assert counted == []


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of the other flags that it sets with this one
def test_the_user_turns_it_off(products: list[int]) -> None:
    x, matrix, bias = case()
    with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(onednn.linear(x, matrix, bias), F.linear(x, matrix, bias))
    assert products == []
