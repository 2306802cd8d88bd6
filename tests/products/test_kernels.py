"""Kernels equal the dense product, compile for the GPUs they are for, and are chosen only where they can run and pay.

The tests marked `gpu` run on one, and on a CPU in Triton's interpreter: the last test of the file starts a process for
that, because Triton decides when it is imported.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tdkit import Decomposition, Kronecker, LowRank, PermutedKronecker, TTMatrix
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.models.preparation import prepare
from tdkit.products import cost, kernels
from tdkit.products.cost import CACHED, FUSED, GRAPH, Path, Product

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GPT2_UP = Kronecker(terms=4, a=(768, 384), b=(4, 2))  # 3072x768
can_run = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs CUDA")


def close(y: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of y and of what it was made of; `expected` is float64."""
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[y.dtype]
    assert y.shape == expected.shape
    gap = (y.double() - expected).abs().max() / expected.abs().max()
    assert gap <= tolerance, f"relative error {float(gap):.2g}"


def skip_what_the_interpreter_cannot(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("tl.dot of Triton's interpreter multiplies the bits of bfloat16 as if they were integers")


def normal(*size: int, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """Random numbers; `turned`: neighbours in memory along the last axis but one."""
    values = torch.randn(size, device=DEVICE, dtype=dtype)
    return values.mT.contiguous().mT if turned else values


@can_run
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("parts", [None, 3])
@pytest.mark.parametrize(
    ("tokens", "columns", "rank", "rows"),
    [(1, 37, 5, 19), (1, 1, 1, 1), (1, 700, 9, 70), (2, 1, 3, 1), (3, 130, 7, 65), (16, 64, 33, 40), (20, 9, 2, 3)],
)
def test_a_low_rank_pair(
    tokens: int, columns: int, rank: int, rows: int, parts: int | None, turned: bool, dtype: torch.dtype
) -> None:
    from tdkit.products.kernels.low_rank import low_rank_pair

    if tokens > 1:
        skip_what_the_interpreter_cannot(dtype)
    x, bias = normal(tokens, columns, dtype=dtype), normal(rows, dtype=dtype)
    left, right = normal(rows, rank, dtype=dtype, turned=turned), normal(rank, columns, dtype=dtype, turned=turned)
    expected = x.double() @ right.double().T @ left.double().T
    close(low_rank_pair(x, left, right, bias, parts=parts), expected + bias.double())
    close(low_rank_pair(x.T.contiguous().T, left, right, parts=parts), expected)


SUMS = [
    (1, (7, 5), (4, 2)),
    (4, (6, 10), (4, 2)),
    (3, (2, 4), (9, 11)),
    (2, (13, 17), (3, 1)),
    (1, (1, 1), (1, 1)),
    (8, (9, 70), (1, 8)),
]


@can_run
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize(("terms", "a", "b"), SUMS)
def test_a_kronecker_sum(
    terms: int, a: tuple[int, int], b: tuple[int, int], tokens: int, permuted: bool, dtype: torch.dtype
) -> None:
    from tdkit.products.kernels.kronecker import kronecker_product

    skip_what_the_interpreter_cannot(dtype)
    left, right = normal(terms, *a, dtype=dtype), normal(terms, *b, dtype=dtype, turned=True)
    dense = sum(torch.kron(one, other) for one, other in zip(left.double(), right.double().contiguous(), strict=True))
    if permuted:  # and the terms side by side in memory
        left = left.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert isinstance(dense, Tensor)
    x, bias = normal(tokens, dense.shape[1], dtype=dtype), normal(dense.shape[0], dtype=dtype)
    if not permuted:
        close(kronecker_product(x, left, right), x.double() @ dense.T)
        close(kronecker_product(x, left, right, bias), x.double() @ dense.T + bias.double())
        return
    rows, columns = (torch.randperm(size, device=DEVICE) for size in dense.shape)
    expected = x.double()[:, columns] @ dense[rows].T
    source, target = columns.int(), rows.argsort().int()
    close(kronecker_product(x, left, right, bias, source=source, target=target), expected + bias.double())
    close(kronecker_product(x, left, right, source=source), x.double()[:, columns] @ dense.T)
    close(kronecker_product(x, left, right, target=target), x.double() @ dense[rows].T)


CHOSEN = [LowRank(rank=5), Kronecker(terms=3, b=(4, 2)), PermutedKronecker(terms=2, a=(2, 4))]


def layer_of(kind: Decomposition, shape: tuple[int, int] = (24, 40)) -> FactorizedLinear:
    torch.manual_seed(0)
    bias = nn.Parameter(torch.randn(shape[0], device=DEVICE))
    return FactorizedLinear(kind.fit(torch.randn(shape, device=DEVICE)), bias).eval()


def fused(matrix: FactorizedMatrix, tokens: int) -> Path:
    """The path of the matrix's kernel."""
    return next(path for path in matrix.paths(tokens) if path.name == FUSED)


def only_kernels(matrix: FactorizedMatrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every product go through the matrix's kernel, and fail where it does not."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError("not by a kernel")

    own = matrix.paths
    slow = Path("slow", (Product(10**9, 10**9, 10**9),))
    monkeypatch.setattr(cost, "KERNEL_DEVICES", (DEVICE,))
    monkeypatch.setattr(matrix, "paths", lambda tokens: (slow, *(p for p in own(tokens) if p.name == FUSED)))
    monkeypatch.setattr(matrix, "by_factors", refuse)


@can_run
@pytest.mark.gpu
@pytest.mark.parametrize("kind", CHOSEN, ids=lambda kind: kind.name)
def test_a_layer_calls_its_kernel(kind: Decomposition, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(kind)
    x, dense = torch.randn(2, 3, 40, device=DEVICE), layer.matrix.dense().detach().double()
    monkeypatch.setattr(kernels, "runnable", lambda: True)
    only_kernels(layer.matrix, monkeypatch)
    with torch.inference_mode():
        y = layer(x)
    assert y.shape == (2, 3, 24)
    close(y.reshape(6, 24), x.reshape(6, 40).double() @ dense.T + layer.bias.detach().double())
    with pytest.raises(AssertionError, match="not by a kernel"):  # the factors ask for gradients
        layer.matrix.multiply(x, layer.bias, fused(layer.matrix, 6))


@can_run
@pytest.mark.gpu
def test_rows_that_are_reordered_in_place_are_found_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = layer_of(PermutedKronecker(terms=2, a=(2, 4))).matrix
    x = torch.randn(3, 40, device=DEVICE)
    only_kernels(matrix, monkeypatch)
    for _ in range(2):
        with torch.no_grad():
            y = matrix.multiply(x, None, fused(matrix, 3))
            close(y, x.double() @ matrix.dense().double().T)
            matrix.row_order.copy_(matrix.row_order.roll(5))


@pytest.mark.parametrize("kind", CHOSEN, ids=lambda kind: kind.name)
def test_what_a_kernel_cannot_take_is_multiplied_by_torch(kind: Decomposition) -> None:
    """Here a CPU's tensor, whose gradient is asked for besides."""
    torch.manual_seed(0)
    matrix = kind.fit(torch.randn(24, 40, dtype=torch.float64)).requires_grad_(False)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    y = matrix.multiply(x, torch.ones(24).double(), fused(matrix, 3))
    torch.testing.assert_close(y, x @ matrix.dense().T + 1)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, matrix.dense().sum(0).expand(3, 40))


def test_tensors_that_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, factor = torch.randn(2, 3), nn.Parameter(torch.randn(3))
    assert not kernels.accept(x)
    monkeypatch.setattr(cost, "KERNEL_DEVICES", ("cpu",))
    assert kernels.accept(x, None, factor.detach())
    assert not kernels.accept(x, factor)
    with torch.no_grad():
        assert kernels.accept(x, factor)
        assert not kernels.accept(x, factor.double())
        assert not kernels.accept(x[:0], factor)
        assert not kernels.accept(x, torch.empty(3, device="meta"))
        with torch.autocast("cpu"):
            assert not kernels.accept(x, factor)
        assert not kernels.accept(x, FakeTensorMode().from_tensor(factor))
        seen = []
        with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
            torch.jit.trace(lambda x: x * (seen.append(kernels.accept(x)) or 1), x, check_trace=False)
        assert seen == [False]


@pytest.mark.parametrize("device", ["cpu", "cuda", GRAPH])
def test_none_is_offered_where_none_can_run(device: str) -> None:
    if device == "cpu" or not kernels.runnable():
        assert not kernels.offered(torch.float32, device)
    assert not kernels.offered(torch.float64, device)


def names(matrix: FactorizedMatrix, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> list[str]:
    """The paths without holding at 1, 16 and 512 tokens."""
    return [matrix.path(tokens, prefer="memory", dtype=dtype, device=device).name for tokens in (1, 16, 512)]


def test_a_kernel_is_chosen_where_it_promises_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "runnable", lambda: True)
    up = GPT2_UP.empty((3072, 768), device="meta")
    assert names(up)[:2] == [FUSED, FUSED]  # one launch for ten operations
    assert FUSED not in names(up, device="cpu") + names(up.double(), torch.float64)
    assert all(
        path.name != FUSED for _, path in up.dispatcher.table(up, torch.bfloat16, "cuda", cached=False, training=True)
    )
    path = up.path(1, prefer="speed", dtype=torch.bfloat16, device="cuda")
    assert path.name == CACHED  # one launch as well, by less Python
    up.dispatcher.graphs = True
    path = up.path(1, prefer="speed", dtype=torch.bfloat16, device="cuda")
    assert path.name == FUSED
    assert path.multiply_adds == 2 * 384 * 4 * 768
    pair = LowRank(rank=409).empty((4096, 4096), device="meta")
    assert FUSED not in names(pair)  # two launches for two operations
    pair.dispatcher.graphs = True
    assert names(pair) == [FUSED, FUSED, "right, left"]
    assert names(LowRank(rank=16).empty((768, 768), device="meta")) == ["right, left"] * 3
    wide = LowRank(rank=3000).empty((4096, 4096), device="meta")
    wide.dispatcher.graphs = True
    assert wide.path(1, prefer="speed", dtype=torch.bfloat16, device="cuda").name == CACHED


@pytest.mark.parametrize("kind", [Kronecker(terms=4, a=(64, 64)), Kronecker(terms=9, b=(4, 4)), TTMatrix(ranks=4)])
def test_structures_without_a_kernel(kind: Decomposition) -> None:
    assert FUSED not in {path.name for path in kind.empty((4096, 4096), device="meta").paths(1)}
    assert FUSED in {path.name for path in LowRank(rank=4).empty((8, 8), device="meta").paths(16)}
    assert FUSED not in {path.name for path in LowRank(rank=4).empty((8, 8), device="meta").paths(17)}


def test_prepare_says_whether_a_graph_replays_the_calls() -> None:
    layer = FactorizedLinear(LowRank(rank=4).empty((8, 8)), None)
    assert prepare(layer, graphs=True).matrix.dispatcher.graphs
    assert not prepare(layer).matrix.dispatcher.graphs


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(
    capability: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of real layers become machine code that copies the factors in pieces of 16 bytes."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from tdkit.products.kernels import kronecker, low_rank

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pair, up = LowRank(rank=128).empty((3072, 768)).bfloat16(), GPT2_UP.empty((3072, 768)).bfloat16()
    found: dict[str, list[str]] = {}
    for name, module, matrix in (("_few_rows", low_rank, pair), ("_kronecker", kronecker, up)):
        for tokens in (1, 16):
            calls = found[f"{name}, {tokens}"] = []
            x, bias = torch.zeros(tokens, 768, dtype=torch.bfloat16), torch.zeros(3072, dtype=torch.bfloat16)
            with monkeypatch.context() as patch, compiling_for(capability):
                patch.setattr(module, name, Compiler(getattr(module, name), calls))
                matrix.fused(x, bias)
    assert [len(calls) for calls in found.values()] == [2, 2, 1, 1]
    for calls in found.values():
        for assembly in calls:
            assert "ld.global.v4.b32" in assembly or "cp.async.cg.shared.global" in assembly
    assert not any("mma" in assembly for assembly in found.pop("_few_rows, 1"))
    assert all("mma" in assembly for calls in found.values() for assembly in calls)  # on the tensor cores


class Compiler:
    """A kernel that is compiled for the arguments of a call, and not run."""

    def __init__(self, kernel: Any, calls: list[str]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            built = self.kernel.warmup(*arguments, grid=grid, **options)
            assert built.asm["cubin"]
            assert built.metadata.shared <= 99 * 1024  # the least that such a GPU has for a block
            self.calls.append(built.asm["ptx"])

        return call


@contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Tell Triton that there is a GPU of a compute capability, of which it asks no more than that."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    before = dict(vars(driver))  # to go back by Triton's own means there must be a GPU
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: capability,  # kernels are kept by device: one for each capability
            get_current_stream=lambda device: 0,
        )
    )
    try:
        yield
    finally:
        vars(driver).update(before)


def test_the_products_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
