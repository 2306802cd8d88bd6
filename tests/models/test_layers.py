"""Factorised layers: forward equals the dense layer's, weight is read-only and dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tdkit import Decomposition, Kronecker, LowRank, TTMatrix
from tdkit.decompositions.registered import decompositions
from tdkit.models.hosts.embedding import FactorizedEmbedding
from tdkit.models.hosts.linear import FactorizedConv1D, FactorizedLinear
from tests.kinds import OF_MATRICES


def fitted(name: str, weight: torch.Tensor) -> FactorizedLinear:
    shape = (weight.shape[0], weight.shape[1])
    return FactorizedLinear(decompositions.get(name)().candidates(shape)[0].fit(weight), None)


@pytest.mark.parametrize("name", OF_MATRICES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_product_with_its_weight(name: str, bias: bool) -> None:
    weight, x = torch.randn(12, 18, dtype=torch.float64), torch.randn(3, 4, 18, dtype=torch.float64)
    matrix = decompositions.get(name)().candidates((12, 18))[0].fit(weight)
    b = nn.Parameter(torch.randn(12, dtype=torch.float64)) if bias else None
    layer = FactorizedLinear(matrix, b)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, b))
    assert layer.weight.shape == (12, 18)
    assert (layer.in_features, layer.out_features) == (18, 12)
    assert layer.replaces == "Linear"


def test_a_transposed_linear_shows_its_weight_as_conv1d_does() -> None:
    layer = FactorizedConv1D(LowRank(rank=2).fit(torch.randn(12, 18)), None)
    assert layer.weight.shape == (18, 12)
    assert (layer.nf, layer.nx) == (12, 18)
    assert layer.replaces == "Conv1D"
    torch.testing.assert_close(layer(torch.eye(18)), layer.weight)


def test_the_weight_is_read_only() -> None:
    layer = fitted("low_rank", torch.randn(12, 18))
    for value in (nn.Parameter(torch.randn(12, 18)), torch.randn(12, 18)):
        with pytest.raises(AttributeError, match=r"weight of a FactorizedLinear is read-only.*change the factors"):
            layer.weight = value  # type: ignore[misc]
    assert "weight" not in dict(layer.named_parameters())
    assert list(layer.state_dict()) == ["matrix.left", "matrix.right"]
    before = layer.weight.detach().clone()
    layer.weight.data.zero_()  # a copy: what foreign code does to it is lost, not applied by halves
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0)


def test_gradients_reach_the_factors_through_the_weight() -> None:
    layer = fitted("low_rank", torch.randn(12, 18))
    layer.weight.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())


@pytest.mark.parametrize("name", OF_MATRICES)
def test_embedding_is_the_look_up_of_its_weight(name: str) -> None:
    matrix = decompositions.get(name)().candidates((30, 12))[0].fit(torch.randn(30, 12, dtype=torch.float64))
    layer = FactorizedEmbedding(matrix)
    ids = torch.tensor([[0, 29, 3], [3, 3, 1]])
    torch.testing.assert_close(layer(ids), F.embedding(ids, layer.weight))
    assert (layer.num_embeddings, layer.embedding_dim) == (30, 12)
    assert layer.replaces == "Embedding"


def test_a_zero_padding_row_stays_zero_and_no_padding_row_gets_a_gradient() -> None:
    matrix = LowRank(rank=3).fit(torch.randn(10, 6))
    ids = torch.tensor([4, 2, 4])
    zero = FactorizedEmbedding(matrix, 4, zero_padding=True)
    assert not zero(ids)[[0, 2]].any()
    kept = FactorizedEmbedding(matrix, 4)
    torch.testing.assert_close(kept(ids), matrix.rows(ids))
    for layer in (zero, kept):
        layer.zero_grad()
        layer(torch.tensor([4, 4])).sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
        layer(ids).sum().backward()
        left = matrix.left.grad
        assert left is not None
        assert left[2].any()
        assert not left[4].any()


@pytest.mark.parametrize("name", OF_MATRICES)
def test_a_row_that_does_not_exist_is_an_error(name: str) -> None:
    matrix = decompositions.get(name)().candidates((10, 6))[0].fit(torch.randn(10, 6))
    for bad in (10, 1000, -1):
        with pytest.raises(IndexError, match=rf"id {bad} is out of range: the embedding has rows 0 to 9"):
            FactorizedEmbedding(matrix)(torch.tensor([0, bad]))


def test_layers_print_what_they_are() -> None:
    text = str(fitted("low_rank", torch.randn(12, 18)))
    assert "in_features=18, out_features=12, bias=False" in text
    assert "12x18, low_rank(rank=1), params=30" in text


@pytest.mark.parametrize("kind", [LowRank(rank=3), Kronecker(terms=2, a=(4, 2)), TTMatrix(ranks=3)])
def test_the_factors_of_an_embedding_lie_as_its_rows_are_read(kind: Decomposition) -> None:
    layer = FactorizedEmbedding(kind.fit(torch.randn(40, 12)))
    assert all(parameter.is_contiguous() for parameter in layer.parameters())
