"""On a GPU: graphs that replay a compressed model, compilation by inductor, and equality with the dense product."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import Decomposition, Kronecker, LowRank, PermutedKronecker, Policy, Rule, TTMatrix
from tdkit.models.preparation import cached_bytes, factorized_matrices, prepare
from tdkit.products import kernels
from tdkit.products.cost import CACHED, FUSED
from tests.conftest import TiedModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

KINDS = [
    LowRank(rank=8),
    Kronecker(terms=2, b=(4, 2)),
    PermutedKronecker(terms=2, b=(4, 2)),
    TTMatrix(ranks=4),
]
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 0.05, "atol": 0.05}}


def model_of(kind: Decomposition, dtype: torch.dtype = torch.float32) -> nn.Module:
    """An embedding, two layers and a tied head, every weight factorised on the CPU and moved."""
    torch.manual_seed(0)
    policy = Policy([Rule("*", kind)], allow_growth=True)
    return tdkit.compress(TiedModel(vocabulary=40, width=24), policy, progress=False).to("cuda", dtype).eval()


def captured(model: nn.Module, given: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one call, after the calls outside a graph that cache weights and compile kernels; and its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(given)
    return graph, output


@pytest.mark.parametrize("prefer", ["speed", "memory"])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@torch.inference_mode()
def test_a_graph_replays_a_compressed_model(
    kind: Decomposition, dtype: torch.dtype, graphs: bool, prefer: tdkit.decompositions.base.Preference
) -> None:
    with torch.inference_mode(False):
        model = prepare(model_of(kind, dtype), prefer=prefer, graphs=graphs)
        twin = copy.deepcopy(model).float().cpu()
    ids = torch.zeros(1, 3, dtype=torch.long, device="cuda")
    graph, output = captured(model, ids)
    cached = cached_bytes(model)
    for _ in range(2):
        ids.random_(40)
        graph.replay()
        torch.testing.assert_close(output, model(ids), **TOLERANCE[dtype])
        torch.testing.assert_close(output.float().cpu(), twin(ids.cpu()), **TOLERANCE[dtype])
    assert cached == 0 or prefer == "speed"


def cached_layer() -> nn.Module:
    """One layer that is fastest with its weight cached at 512 tokens."""
    policy = Policy([Rule("*", TTMatrix(ranks=16))], allow_growth=True)
    model = tdkit.compress(nn.Sequential(nn.Linear(64, 64)), policy, progress=False).cuda()
    assert factorized_matrices(model)[0].path(512, prefer="speed").name == CACHED
    return model


@torch.no_grad()
def test_a_graph_reads_a_weight_that_was_cached_before() -> None:
    model, x = prepare(cached_layer()), torch.randn(512, 64, device="cuda")
    graph, output = captured(model, x)
    assert cached_bytes(model) == 64 * 64 * 4
    x.normal_()
    graph.replay()
    torch.testing.assert_close(output, model(x))


@torch.no_grad()
def test_no_weight_is_cached_that_a_capture_would_build() -> None:
    model, x = cached_layer(), torch.randn(512, 64, device="cuda")
    captured(prepare(model, prefer="memory"), x)  # the workspaces of cuBLAS are made here
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = prepare(model)(x)
    assert cached_bytes(model) == 0
    graph.replay()
    torch.testing.assert_close(output, prepare(model, prefer="memory")(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_inductor_compiles_a_compressed_model_without_a_graph_break(kind: Decomposition, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = prepare(model_of(kind, dtype))
    compiled = torch.compile(model, fullgraph=True)
    for shape in ((1, 3), (2, 7)):
        ids = torch.randint(40, shape, device="cuda")
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids), model(ids), **TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_training_step_equals_that_of_the_cpu(kind: Decomposition) -> None:
    model = model_of(kind).train()
    twin = copy.deepcopy(model).cpu()
    ids = torch.randint(40, (2, 7))
    model(ids.cuda()).square().mean().backward()
    twin(ids).square().mean().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not kernels.runnable(), reason="needs Triton and an Ampere GPU or a newer one")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("permuted", [False, True])
@torch.inference_mode()
def test_a_layer_of_gpt2_s_size_runs_its_kernel(dtype: torch.dtype, permuted: bool) -> None:
    decomposition = (PermutedKronecker if permuted else Kronecker)(terms=4, a=(768, 384), b=(4, 2))
    with torch.inference_mode(False):
        matrix = decomposition.empty((3072, 768), device="cuda", dtype=dtype)
        for factor in matrix.parameters():
            nn.init.normal_(factor, std=0.1)
        for order in matrix.buffers():
            order.copy_(torch.randperm(len(order)))
    prepare(matrix, prefer="memory", graphs=True)
    bias = torch.randn(3072, device="cuda", dtype=dtype)
    for tokens in (1, 4):
        assert matrix.path(tokens).name == FUSED
        x = torch.randn(tokens, 768, device="cuda", dtype=dtype)
        expected = x.double() @ copy.deepcopy(matrix).double().dense().T + bias.double()
        torch.testing.assert_close(matrix.linear(x, bias).double(), expected, **TOLERANCE[dtype])
