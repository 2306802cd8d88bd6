"""Every structure multiplies, builds and pulls back as the dense matrix does; the cost model ranks as measured."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tdkit import Decomposition, Kronecker, LowRank, TTMatrix
from tdkit.products.cost import BOUNDS, CACHED, Path, Product, chunk_of, lookup, path_table
from tdkit.products.low_rank import LANES, MANY, LowRankStructure
from tdkit.products.structure import Structure, product
from tdkit.products.train import KroneckerStructure, TrainStructure
from tdkit.shapes import Shape

STRUCTURES: list[Structure] = [
    LowRankStructure((5, 7), 3),
    LowRankStructure((1, 1), 1),
    KroneckerStructure((6, 20), 2, (3, 4), (2, 5)),
    KroneckerStructure((34, 40), 1, (2, 2), (17, 20)),
    KroneckerStructure((40, 34), 1, (20, 17), (2, 2)),
    KroneckerStructure((12, 12), 2, (2, 6), (6, 2)),
    KroneckerStructure((12, 12), 3, (6, 2), (2, 6)),
    KroneckerStructure((40, 40), 2, (2, 20), (20, 2)),
    TrainStructure((11, 23), (1, 2, 3, 1), (2, 3, 2), (4, 3, 2)),
    TrainStructure((6, 5), (1, 1), (7,), (6,)),
    TrainStructure((30, 16), (1, 2, 3, 2, 1), (2, 3, 2, 3), (2, 2, 2, 2)),
    TrainStructure((30, 16), (1, 2, 3, 3, 2, 1), (2, 3, 2, 3, 1), (2, 2, 2, 2, 1)),
]
IDS = [f"{type(s).__name__}-{'x'.join(map(str, s.shape))}-{number}" for number, s in enumerate(STRUCTURES)]


def factors_of(structure: Structure) -> list[Tensor]:
    """Random float64 factors."""
    match structure:
        case LowRankStructure((rows, columns), rank):
            sizes: Sequence[tuple[int, ...]] = [(rows, rank), (rank, columns)]
        case KroneckerStructure(_, terms, a, b):
            sizes = [(terms, *a), (terms, *b)]
        case TrainStructure():
            sizes = structure.cores
    return [torch.randn(*size, dtype=torch.float64) for size in sizes]


def dense_of(structure: Structure, factors: list[Tensor]) -> Tensor:
    """The matrix by its definition, entry by entry or with torch.kron."""
    match structure:
        case LowRankStructure():
            return torch.einsum("or,ri->oi", *factors)
        case KroneckerStructure():
            return sum(torch.kron(a, b) for a, b in zip(*factors, strict=True))
        case TrainStructure((rows, columns), _, out_modes, in_modes):
            dense = torch.zeros(math.prod(out_modes), math.prod(in_modes), dtype=torch.float64)
            outs = itertools.product(*map(range, out_modes))
            for i, out in enumerate(outs):
                for j, into in enumerate(itertools.product(*map(range, in_modes))):
                    row = torch.ones(1, 1, dtype=torch.float64)
                    for core, m, n in zip(factors, out, into, strict=True):
                        row = row @ core[:, m, n]
                    dense[i, j] = row.item()
            return dense[:rows, :columns]
    raise AssertionError(structure)


@pytest.mark.parametrize("structure", STRUCTURES, ids=IDS)
def test_build_is_the_definition(structure: Structure) -> None:
    factors = factors_of(structure)
    torch.testing.assert_close(structure.build(factors), dense_of(structure, factors))


@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
@pytest.mark.parametrize("structure", STRUCTURES, ids=IDS)
def test_products_equal_the_dense_ones(structure: Structure, tokens: int) -> None:
    factors = factors_of(structure)
    dense = dense_of(structure, factors)
    x = torch.randn(tokens, structure.shape[1], dtype=torch.float64)
    y = torch.randn(tokens, structure.shape[0], dtype=torch.float64)
    for path in structure.factor_paths(max(tokens, 1)):
        torch.testing.assert_close(structure.multiply(x, factors, path), x @ dense.T)
        needs = [False] * len(factors)
        grad_x, _ = structure.factor_backward(y, x, factors, path, True, needs)
        torch.testing.assert_close(grad_x, y @ dense)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4])
def test_a_product_with_few_rows_is_the_same_product(rows: int, by_rows: bool) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(rows, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    matrix = torch.randn(5, 7, dtype=torch.float64) if by_rows else torch.randn(7, 5, dtype=torch.float64).T
    for given in (None, bias):
        found = product(x, matrix, given)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, matrix, given))
        assert found.is_contiguous()


@pytest.mark.parametrize("tokens", [MANY - 1, MANY])
@pytest.mark.parametrize("rank", [1, LANES - 1, LANES, LANES + 1])
def test_a_padded_rank_gives_the_same_product(rank: int, tokens: int) -> None:
    torch.manual_seed(0)
    structure = LowRankStructure((40, 24), rank)
    factors = torch.randn(40, rank, dtype=torch.float64), torch.randn(rank, 24, dtype=torch.float64)
    x, bias = torch.randn(tokens, 24, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    (path,) = structure.factor_paths(tokens)
    expected = torch.nn.functional.linear(x, factors[0] @ factors[1], bias)
    torch.testing.assert_close(structure.multiply(x, factors, path, bias), expected)


@pytest.mark.parametrize("structure", STRUCTURES, ids=IDS)
def test_pullbacks_equal_autograd(structure: Structure) -> None:
    factors = [factor.requires_grad_() for factor in factors_of(structure)]
    x = torch.randn(5, structure.shape[1], dtype=torch.float64)
    gradient = torch.randn(5, structure.shape[0], dtype=torch.float64)
    expected = torch.autograd.grad((gradient * (x @ structure.build(factors).T)).sum(), factors)
    with torch.no_grad():
        found = [structure.pullback(gradient.T @ x, factors)]
        needs = [True] * len(factors)
        found += [structure.backward(gradient, x, factors, path, False, needs)[1] for path in structure.paths(5)]
    for gradients in found:
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_chunks_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = KroneckerStructure((96, 80), 2, (4, 4), (24, 20))
    factors = factors_of(structure)
    x, y = torch.randn(37, 80, dtype=torch.float64), torch.randn(37, 96, dtype=torch.float64)
    path = structure.factor_paths(37)[0]
    with torch.no_grad():
        whole = structure.multiply(x, factors, path)
        grad_x, pulled = structure.factor_backward(y, x, factors, path, True, [True, True])
        monkeypatch.setattr("tdkit.products.cost.CHUNK_BYTES", 16 * 2 * 96 * 8)
        assert chunk_of(37, 2 * 4 * 24 * 8, "cpu") < 37
        torch.testing.assert_close(structure.multiply(x, factors, path), whole)
        chunked_x, chunked = structure.factor_backward(y, x, factors, path, True, [True, True])
        torch.testing.assert_close(chunked_x, grad_x)
        for one, other in zip(chunked, pulled, strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(structure.multiply(x, factors, path), whole)


def test_only_a_cpu_multiplies_in_chunks() -> None:
    assert chunk_of(10_000, 10**6, "cuda") == 10_000
    assert chunk_of(10_000, 10**6, "cpu") < 10


@pytest.mark.parametrize("a", [(8, 2), (2, 8)])
def test_factors_lie_in_memory_as_the_products_of_one_token_need_them(a: tuple[int, int]) -> None:
    matrix = Kronecker(terms=3, a=a).empty((16, 16))
    axes, moved = matrix.structure.a_axes, matrix.structure.b_axes
    for twin in (matrix, matrix.double(), torch.nn.Sequential(matrix).to(torch.bfloat16)[0]):
        assert twin.a.permute(axes).is_contiguous()
        assert twin.b.permute(moved).is_contiguous()


@pytest.mark.parametrize("shape", [(768, 192), (192, 768), (64, 64), (5, 30)])
@pytest.mark.parametrize("kind", [Kronecker(), TTMatrix()])
def test_the_default_shapes_multiply_one_token_without_moving_a_number(kind: Decomposition, shape: Shape) -> None:
    """Every step is one product of tensors as they lie, apart from the padding of a dimension that is odd."""
    matrix = kind.complete(shape, shape[0] * shape[1] // 3).empty(shape, device="meta")
    assert min(path.moved for path in matrix.structure.factor_paths(1)) == 0


def test_multiply_adds_of_a_path_are_those_of_its_products() -> None:
    paths = KroneckerStructure((48 * 64, 24 * 32), 4, (48, 24), (64, 32)).factor_paths(512)
    path = next(path for path in paths if path.name == "B, A")
    assert path.multiply_adds == 512 * 4 * 24 * 64 * (32 + 48)
    assert LowRank(rank=8).empty((30, 20), device="meta").multiply_adds() == 8 * 50


def test_every_order_of_a_short_train_is_compared_and_the_best_is_taken() -> None:
    structure = TrainStructure((64, 64), (1, 2, 2, 1), (4, 4, 4), (4, 4, 4))
    paths = structure.factor_paths(1)
    assert len({path.name for path in paths}) == 6
    assert min(path.multiply_adds for path in paths) == 4 * 64 * 2 + 4 * 64 * 4 + 4 * 64 * 2  # one end to the other


def test_opt_einsum_orders_a_long_train() -> None:
    """The rank that is 1 in the middle splits the work; a sweep that carries a rank of 9 over it costs more."""
    structure = TrainStructure((2**6, 2**6), (1, 4, 9, 1, 9, 4, 1), (2,) * 6, (2,) * 6)
    paths = structure.factor_paths(3)
    assert {path.order for path in paths} >= {(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0)}
    factors = factors_of(structure)
    x = torch.randn(3, 64, dtype=torch.float64)
    for path in paths:
        assert sorted(path.order) == list(range(6))
        torch.testing.assert_close(structure.multiply(x, factors, path), x @ structure.build(factors).T)


def slow_and_fast(tokens: int) -> tuple[Path, ...]:
    """Factors that do 3 times the work per token, and a weight that costs a fixed time to build."""
    build = Product(1000, 1000, 1000)
    return Path("factors", (Product(tokens, 3000, 1000),)), Path("dense", (build, Product(tokens, 1000, 1000)))


def test_a_schedule_changes_where_the_paths_cross() -> None:
    options = {"dtype": torch.float32, "device": "cpu", "threads": 1}
    built = path_table(slow_and_fast, (1000, 1000), cached=False, **options)
    assert [path.name for _, path in built] == ["factors", "dense"]
    assert 64 <= built[0][0] <= 2048
    for tokens in (1, built[0][0]):
        assert lookup(built, tokens).name == "factors"
    for tokens in (built[0][0] + 1, 10**7):
        assert lookup(built, tokens).name == "dense"
    held = path_table(slow_and_fast, (1000, 1000), cached=True, **options)
    assert [path.name for _, path in held] == [CACHED]
    assert held[-1][0] == BOUNDS[-1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_few_parameters_are_multiplied_as_factors_and_many_are_not(device: str, dtype: torch.dtype) -> None:
    thin, thick = (LowRank(rank=r).empty((4096, 4096), device="meta") for r in (64, 2048))
    for tokens in (1, 512):
        assert thin.path(tokens, prefer="speed", dtype=dtype, device=device).name == "right, left"
        assert thick.path(tokens, prefer="speed", dtype=dtype, device=device).name == CACHED
        assert thin.path(tokens, dtype=dtype, device=device).seconds(dtype, device, 1) > 0


def test_linear_of_a_layer_keeps_batch_axes_and_bias() -> None:
    matrix = Kronecker(terms=2, a=(2, 2)).fit(torch.randn(6, 8))
    bias, x = nn.Parameter(torch.randn(6)), torch.randn(2, 3, 8)
    torch.testing.assert_close(matrix.linear(x, bias), x @ matrix.dense().T + bias)
    torch.testing.assert_close(matrix.matmul(x[0, 0]), x[0, 0] @ matrix.dense().T)
