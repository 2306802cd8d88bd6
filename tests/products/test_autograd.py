"""The gradient of every path, what it saves, and the company it keeps: autocast, checkpointing, compilation."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from tdkit import Kronecker, LowRank, PermutedKronecker, TTMatrix
from tdkit.decompositions.base import Decomposition, FactorizedMatrix
from tdkit.evaluation.timing import saved_bytes
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.products.autograd import linear, reorder
from tdkit.products.structure import Structure
from tests.products.test_structure import IDS, STRUCTURES, factors_of

KINDS = [LowRank(rank=5), Kronecker(terms=3, a=(4, 8)), PermutedKronecker(terms=3, a=(4, 8)), TTMatrix(ranks=4)]
SHAPE = (32, 48)


def layer_of(kind: Decomposition, dtype: torch.dtype = torch.float32) -> FactorizedLinear:
    torch.manual_seed(0)
    matrix = kind.fit(torch.randn(SHAPE, dtype=dtype))
    return FactorizedLinear(matrix, nn.Parameter(torch.randn(SHAPE[0], dtype=dtype)))


def gradients(layer: nn.Module, x: Tensor, run=None) -> list[Tensor]:
    """Gradients of a scalar of the layer's output for x and every parameter."""
    x = x.clone().requires_grad_()
    y = (layer if run is None else run)(x)
    return list(torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("structure", STRUCTURES, ids=IDS)
def test_first_and_second_derivatives_of_every_path(structure: Structure) -> None:
    factors = [factor.requires_grad_() for factor in factors_of(structure)]
    x = torch.randn(2, structure.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(structure.shape[0], dtype=torch.float64, requires_grad=True)
    for path in structure.paths(2):

        def run(x: Tensor, bias: Tensor, *factors: Tensor, path=path) -> Tensor:
            return linear(x, bias, factors, structure, path)

        assert gradcheck(run, (x, bias, *factors), fast_mode=True)
        assert gradgradcheck(run, (x, bias, *factors), fast_mode=True)


@pytest.mark.parametrize("structure", STRUCTURES, ids=IDS)
def test_only_the_gradients_that_are_needed(structure: Structure) -> None:
    factors = factors_of(structure)
    x = torch.randn(2, structure.shape[1], dtype=torch.float64, requires_grad=True)
    for path in structure.paths(2):
        (grad_x,) = torch.autograd.grad(linear(x, None, factors, structure, path).sum(), x)
        torch.testing.assert_close(grad_x, torch.ones(2, structure.shape[0]).double() @ structure.build(factors))
        factors[0].requires_grad_()
        assert torch.autograd.grad(linear(x.detach(), None, factors, structure, path).sum(), factors[0])
        factors[0].requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_more_is_saved_than_x_and_the_factors(kind: Decomposition) -> None:
    layer = layer_of(kind)
    factors = sum(p.numel() * p.element_size() for p in layer.matrix.parameters())
    permutations = sum(b.numel() * b.element_size() for b in layer.matrix.buffers())
    x = torch.randn(512, SHAPE[1], requires_grad=True)
    assert saved_bytes(lambda: layer(x)) <= x.numel() * 4 + factors + permutations


def test_a_train_saves_a_fraction_of_what_a_dense_layer_does() -> None:
    layer = FactorizedLinear(TTMatrix(ranks=16).empty((3072, 768)), None)
    with torch.no_grad():
        for factor in layer.parameters():
            factor.normal_()
    x = torch.randn(512, 768, requires_grad=True)
    dense = nn.Linear(768, 3072, bias=False)
    assert saved_bytes(lambda: layer(x)) <= 0.25 * saved_bytes(lambda: dense(x))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_autocast_multiplies_in_its_dtype_and_leaves_gradients_in_theirs(kind: Decomposition) -> None:
    layer = layer_of(kind)
    x = torch.randn(7, SHAPE[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        found = gradients(layer, x)
    for one, other in zip(found, gradients(layer, x), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1 * float(other.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gradient_checkpointing(kind: Decomposition, reentrant: bool) -> None:
    layer = layer_of(kind)
    x = torch.randn(7, SHAPE[1])
    expected = gradients(layer, x)
    x.requires_grad_()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for one, other in zip([x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_compilation_without_a_graph_break_trains_alike(kind: Decomposition, backend: str) -> None:
    torch.compiler.reset()
    layer = layer_of(kind)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for tokens in (5, 9):  # the second is compiled with a symbolic number of tokens
        x = torch.randn(tokens, SHAPE[1])
        for one, other in zip(gradients(layer, x, compiled), gradients(layer, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_reordering_is_the_inverse_one() -> None:
    order = torch.randperm(6, dtype=torch.int32)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(reorder(x, order), x[..., order])
    assert gradcheck(lambda x: reorder(x, order), (x,))
    assert gradgradcheck(lambda x: reorder(x, order), (x,))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_training_repeats_bit_for_bit(kind: Decomposition) -> None:
    x = torch.randn(16, SHAPE[1])
    results = []
    for _ in range(2):
        layer = layer_of(kind)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        for _ in range(3):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in layer.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


class OnlyDense(FactorizedMatrix):
    """A plugin's matrix that writes nothing but `dense`."""

    def __init__(self) -> None:
        super().__init__(LowRank(rank=1), SHAPE)
        self.column = nn.Parameter(torch.randn(SHAPE[0], 1))
        self.row = nn.Parameter(torch.randn(1, SHAPE[1]))

    def dense(self) -> Tensor:
        return self.column @ self.row


def test_a_plugin_that_only_writes_dense_trains_and_compiles() -> None:
    layer = FactorizedLinear(OnlyDense(), nn.Parameter(torch.zeros(SHAPE[0])))
    x = torch.randn(3, SHAPE[1])
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for one, other in zip(gradients(layer, x, compiled), gradients(layer, x), strict=True):
        torch.testing.assert_close(one, other)
