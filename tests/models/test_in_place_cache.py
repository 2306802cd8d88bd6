"""Weights computed dense: cached in eval mode, built again after every change, never where it is not wanted."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.models.preparation import cached_bytes, factorized_matrices
from tests.models.test_in_place import MODULES, SIZE, Reads, built, tensor_of

DENSE = (
    *("reads", "table", "bare", "lstm", "projected lstm", "gru", "rnn", "lstm cell", "gru cell", "attention"),
    *("attention, other sizes", "bilinear", "embedding bag"),
)
every = pytest.mark.parametrize("name", DENSE)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def compressed(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A module in eval mode with factors of rank 2, and its call."""
    module, inputs = built(name)
    tdkit.compress(module, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    return module, lambda called: tensor_of(called(*inputs))


def dense_bytes(module: nn.Module) -> int:
    return sum(4 * matrix.shape[0] * matrix.shape[1] for matrix in factorized_matrices(module))


def expected_of(module: nn.Module, call: Callable[[nn.Module], Tensor]) -> Tensor:
    """The output of a copy that caches nothing."""
    fresh = tdkit.prepare(copy.deepcopy(module), prefer="memory")
    output = call(fresh)
    assert cached_bytes(fresh) == 0
    return output


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_weight_that_is_computed_dense_is_built_once(
    name: str, mode: Callable[[], torch.no_grad], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, call = compressed(name)
    calls = []
    for matrix in factorized_matrices(module):
        dense = matrix.dense
        monkeypatch.setattr(matrix, "dense", lambda dense=dense: calls.append(1) or dense())
    with mode():
        first = call(module)
        built_once = len(calls)
        assert torch.equal(call(module), first)
        assert len(calls) == built_once > 0
        assert 0 < cached_bytes(module) <= dense_bytes(module)
        tdkit.prepare(module, prefer="memory")
        assert torch.equal(call(module), first)
        assert torch.equal(call(module), first)
    assert len(calls) >= 3 * built_once
    assert cached_bytes(module) == 0


def test_layers_that_multiply_by_their_factors_cache_nothing() -> None:
    module, call = compressed("linear")
    with torch.inference_mode():
        call(module)
    assert cached_bytes(module) == 0


def written(module: nn.Module) -> None:
    for matrix in factorized_matrices(module):
        next(matrix.parameters()).detach().mul_(2)


def loaded(module: nn.Module) -> None:
    module.load_state_dict({name: 0.5 * tensor for name, tensor in module.state_dict().items()})


def assigned(module: nn.Module) -> None:
    for matrix in factorized_matrices(module):
        for name, parameter in list(matrix.named_parameters()):
            setattr(matrix, name, nn.Parameter(parameter.detach() * 3))


def swapped(module: nn.Module) -> None:
    for matrix in factorized_matrices(module):
        for parameter in matrix.parameters():
            parameter.data = parameter.data * 3


def moved(module: nn.Module) -> None:
    module.to(torch.bfloat16).float()


def trained_in_between(module: nn.Module) -> None:
    module.train()
    assert cached_bytes(module) == 0
    module.eval()
    written(module)


@every
@pytest.mark.parametrize("change", [written, loaded, assigned, swapped, moved, trained_in_between])
def test_a_change_of_the_factors_is_seen(name: str, change: Callable[[nn.Module], None]) -> None:
    module, call = compressed(name)
    with torch.no_grad():
        before = call(module)
        change(module)
        expected = expected_of(module, call)
        assert torch.equal(call(module), expected)
        assert not torch.equal(expected, before)
        assert cached_bytes(module) > 0


@every
def test_copies_and_pickles_carry_no_weight(name: str) -> None:
    module, call = compressed(name)
    with torch.no_grad():
        expected = call(module)
        names = set(module.state_dict())
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert cached_bytes(twin) == 0
            assert torch.equal(call(twin), expected)
            assert set(twin.state_dict()) == names
        written(twin)
        assert torch.equal(call(module), expected)


@every
def test_gradients_go_to_the_factors_as_if_nothing_had_been_cached(name: str) -> None:
    module, call = compressed(name)
    fresh = copy.deepcopy(module)
    with torch.no_grad():
        call(module)
    for each in (module, fresh):
        call(each).square().sum().backward()
    for own, other in zip(module.parameters(), fresh.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        assert own.grad is None or torch.equal(own.grad, other.grad)


def test_in_train_mode_nothing_is_cached() -> None:
    module, call = compressed("gru")
    module.train()
    with torch.no_grad():
        call(module)
    assert cached_bytes(module) == 0


def test_what_is_written_into_a_weight_is_lost() -> None:
    module, call = compressed("bare")
    with torch.no_grad():
        expected = call(module)
        module.p.zero_()
        assert torch.equal(call(module), expected)
        module.p[0].fill_(7.0)
        assert torch.equal(call(module), expected)


def test_a_weight_cached_under_autocast_is_as_exact_as_any() -> None:
    module, call = compressed("bare")
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            call(module)
        assert cached_bytes(module) > 0
        assert torch.equal(call(module), expected_of(module, call))


def test_another_module_s_product_with_a_weight_caches_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, SIZE)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.embed(ids), self.embed.weight)

    torch.manual_seed(0)
    model = tdkit.compress(Tied().eval(), Policy([Rule("*", LowRank(rank=2))]), progress=False)
    ids = torch.arange(9)
    with torch.no_grad():
        model.embed(ids)
        assert cached_bytes(model) == 0
        first = model(ids)
        assert cached_bytes(model) == 4 * 9 * SIZE
        assert torch.equal(model(ids), first)
        assert torch.equal(first, tdkit.prepare(model, prefer="memory")(ids))


def test_a_weight_that_is_reshaped_in_forward_is_cached_too() -> None:
    class Standardised(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            weight = self.weight.reshape(1, SIZE, SIZE)
            return F.linear(input, (weight - weight.mean()).squeeze(0))

    torch.manual_seed(0)
    module = tdkit.compress(Standardised(SIZE, SIZE).eval(), Policy([Rule("*", LowRank(rank=2))]), progress=False)
    x = torch.randn(3, SIZE)
    with torch.no_grad():
        first = module(x)
        assert cached_bytes(module) == 4 * SIZE * SIZE
        copied = module.weight.reshape(SIZE, SIZE)  # outside of forward it is a copy
        copied.zero_()
        assert torch.equal(module(x), first)


def test_transforms_and_traces_see_the_factors() -> None:
    torch.manual_seed(0)
    module = tdkit.compress(Reads(SIZE, SIZE).eval(), Policy([Rule("*", LowRank(rank=2))]), progress=False)
    x = torch.randn(3, SIZE)
    with torch.no_grad():
        expected = module(x)
        state = {name: torch.stack([value, 2 * value]) for name, value in module.state_dict().items()}
        both = torch.func.vmap(lambda own: functional_call(module, own, (x,)))(state)
        torch.testing.assert_close(both[0], expected)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`?torch.jit.trace", DeprecationWarning)  # since torch 2.9
            traced = torch.jit.trace(module, (x,), check_trace=False)
        torch.testing.assert_close(traced(x), expected)
        written(module)
        assert not module(x).allclose(expected)
        torch.testing.assert_close(traced(x), module(x))  # it has the factors, which it shares


def test_every_module_that_is_computed_dense_is_tested() -> None:
    by_factors = {"scaled", "shifted", "inherits", "weight norm", "spectral norm", "orthogonal", "linear", "embedding"}
    assert set(DENSE) | by_factors == set(MODULES)
