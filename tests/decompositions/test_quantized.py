"""Rounded factors compute what the decoded ones do, in every product, and lie in integers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdkit.decompositions.auto import Auto
from tdkit.decompositions.kronecker import Kronecker
from tdkit.decompositions.low_rank import LowRank
from tdkit.decompositions.quantized import Quantized, QuantizedMatrix, quantized
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.decompositions.tucker import Tucker
from tdkit.errors import OptionError
from tdkit.models.hosts.convolution import geometry_of
from tests.kinds import OF_MATRICES
from tests.side_packages import use_torchao

use_torchao()

BITS = [8, 4]


def fitted(kind: str, bits: int, shape: tuple[int, ...] = (24, 36)) -> tuple[QuantizedMatrix, torch.Tensor]:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    inner = decomposition(kind)
    chosen = inner.complete(inner.shape_of(shape), weight.numel() // 2)
    assert chosen is not None
    return Quantized(of=chosen, bits=bits).fit(weight), weight  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [name for name in OF_MATRICES if name != "auto"])
def test_every_product_is_that_with_the_decoded_matrix(kind: str, bits: int) -> None:
    matrix, _ = fitted(kind, bits)
    dense = matrix.dense()
    x, bias, ids = torch.randn(3, 5, 36), torch.randn(24), torch.tensor([[0, 23], [7, 7]])
    torch.testing.assert_close(matrix(x, bias), torch.nn.functional.linear(x, dense, bias), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(matrix.matmul(x), x @ dense.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(matrix(ids), dense[ids], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [name for name in OF_MATRICES if name != "auto"])
def test_rounding_is_near_and_smaller(kind: str, bits: int) -> None:
    matrix, weight = fitted(kind, bits)
    inner = matrix.decomposition.factors
    assert inner is not None
    exact = inner.fit(weight)
    gap = (matrix.dense() - exact.dense()).norm() / exact.dense().norm()
    assert 0 < gap < (0.02 if bits == 8 else 0.3)
    held = sum(t.numel() * t.element_size() for t in matrix.buffers())
    floats = sum(t.numel() * t.element_size() for t in exact.parameters())
    indices = sum(t.numel() * t.element_size() for t in exact.buffers())
    assert held - indices < floats * (0.35 if bits == 8 else 0.25)
    assert matrix.params == exact.params
    assert matrix.indices == exact.indices
    assert not list(matrix.parameters())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(BITS), st.integers(0, 999))
def test_a_weight_itself_of_any_shape(out: int, width: int, bits: int, seed: int) -> None:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    matrix = Quantized(bits=bits).fit(weight)  # type: ignore[arg-type]
    x = torch.randn(2, width)
    torch.testing.assert_close(matrix(x), x @ matrix.dense().T, rtol=1e-4, atol=1e-4)
    assert torch.equal(matrix(torch.arange(out)), matrix.dense())
    assert float((matrix.dense() - weight).norm()) < 0.25 * float(weight.norm()) + 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_whole_groups_are_looked_up_alone(bits: int) -> None:
    weight = torch.randn(50, 64)
    matrix = Quantized(bits=bits).fit(weight)  # type: ignore[arg-type]
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(matrix(ids), matrix.dense()[ids])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [Tucker(rank_out=6, rank_in=5), LowRank(rank=4), None])
def test_convolutions(kind: Tucker | LowRank | None, bits: int) -> None:
    weight = torch.randn(8, 6, 3, 3)
    rounding = Quantized(of=kind, bits=bits)  # type: ignore[arg-type]
    matrix = rounding.fit(rounding.view(weight))
    convolution = torch.nn.Conv2d(6, 8, 3, padding=1)
    geometry = geometry_of(convolution)
    x = torch.randn(2, 6, 9, 9)
    dense = matrix.dense().view(8, 6, 3, 3)
    expected = torch.nn.functional.conv2d(x, dense, convolution.bias, padding=1)
    torch.testing.assert_close(matrix(x, convolution.bias, geometry), expected, rtol=1e-4, atol=1e-4)


def test_a_cast_changes_the_dtype_of_the_products_and_no_code() -> None:
    matrix, _ = fitted("low_rank", 4)
    before = {name: buffer.clone() for name, buffer in matrix.state_dict().items()}
    dense = matrix.dense()
    matrix.to(torch.bfloat16)
    assert matrix.dense().dtype == torch.bfloat16
    assert matrix(torch.ones(2, 36, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(torch.equal(before[name], buffer) for name, buffer in matrix.state_dict().items())
    matrix.to(torch.float32)
    assert torch.equal(matrix.dense(), dense)


def test_gradients_reach_the_input_and_no_factor() -> None:
    matrix, _ = fitted("kronecker", 8)
    x = torch.randn(3, 36, requires_grad=True)
    matrix(x).square().sum().backward()
    dense = matrix.dense()
    expected = 2 * (x @ dense.T) @ dense
    torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-4, atol=1e-4)


def test_copies_and_state_are_those_of_the_codes() -> None:
    matrix, _ = fitted("tt_matrix", 4)
    x = torch.randn(2, 36)
    for other in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        assert torch.equal(other(x), matrix(x))
    empty = matrix.decomposition.empty(matrix.sizes, dtype=torch.float32)
    empty.load_state_dict(matrix.state_dict())
    assert torch.equal(empty(x), matrix(x))


@pytest.mark.parametrize("of", [None, LowRank(rank=3), Kronecker(terms=2), Auto(), "tt_matrix"])
def test_the_form_reads_back(of: object) -> None:
    for kind in (Quantized(of=of), Quantized(of=of, bits=4, group=16)):  # type: ignore[arg-type]
        assert decomposition(spec_of(kind)) == kind


def test_open_ranks_are_chosen_as_those_of_the_factors() -> None:
    kind = Quantized(of=LowRank(), bits=4)
    assert not kind.is_complete()
    chosen = kind.complete((20, 30), 200)
    assert chosen == Quantized(of=LowRank(rank=4), bits=4)
    assert chosen is not None
    assert chosen.num_params((20, 30)) == 200


@pytest.mark.parametrize(
    ("options", "what"),
    [({"bits": 5}, "8 or 4"), ({"group": 3}, "even"), ({"of": "nothing"}, "nothing"), ({"of": Quantized()}, "already")],
)
def test_options_are_checked(options: dict[str, object], what: str) -> None:
    with pytest.raises(OptionError, match=what):
        Quantized(**options)  # type: ignore[arg-type]


def test_what_is_quantized_is_not_quantized_again() -> None:
    with pytest.raises(OptionError, match="already"):
        quantized(fitted("low_rank", 8)[0])
