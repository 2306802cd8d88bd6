"""torch.func and forward-mode derivatives of compressed models: those of the same model with dense layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.decompositions.registered import decompositions
from tests.kinds import OF_MATRICES
from tests.models.exporting import OF_TENSORS

# torch's own, when it takes derivatives in forward mode
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

KINDS = [name for name in [*OF_MATRICES, *OF_TENSORS] if name != "auto"]


class Small(nn.Module):
    """A convolution, an embedding and products; an image and ids in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1, stride=2)
        self.embed = nn.Embedding(20, 12)
        self.inner = nn.Linear(12, 24)
        self.outer = nn.Linear(24, 6)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).mean((2, 3)) + self.embed(ids).mean(1)
        y: Tensor = self.outer(torch.tanh(self.inner(h)))
        return y


def made(kind: str, prefer: Any = "memory") -> tuple[nn.Module, nn.Module]:
    """A compressed model, prepared and called before, and the same with dense layers; float64."""
    make = decompositions.get(kind)
    rules = [Rule("*", make())]
    if kind in OF_TENSORS:
        rules = [Rule("conv", make(), budget=0.8), Rule("*", LowRank(rank=3))]
    policy = Policy(rules, budget=None if kind in OF_TENSORS else 0.7, allow_growth=True)
    model = tdkit.compress(Small().double(), policy, progress=False)
    dense = tdkit.to_dense(copy.deepcopy(model)).eval()
    tdkit.prepare(model, prefer=prefer)
    with torch.no_grad():
        model(X, IDS)
    return model, dense


X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(2))


def each_alone(model: nn.Module) -> Tensor:
    return vmap(lambda x, ids: model(x[None], ids[None])[0])(X, IDS)


def without_gradients(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return each_alone(model)


def in_inference_mode(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return each_alone(model)


def dual(model: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, T), IDS)).tangent


TRANSFORMS: dict[str, Callable[[nn.Module], Tensor]] = {
    "vmap": each_alone,
    "vmap without gradients": without_gradients,
    "vmap in inference mode": in_inference_mode,
    "jvp": lambda model: jvp(lambda x: model(x, IDS), (X,), (T,))[1],
    "dual numbers": dual,
    "jacrev": lambda model: jacrev(lambda x: model(x, IDS[:1]))(X[:1]),
    "jacfwd": lambda model: jacfwd(lambda x: model(x, IDS[:1]))(X[:1, :, :3, :3]),
    "batched gradients": lambda model: torch.autograd.functional.jacobian(
        lambda x: model(x, IDS[:1]), X[:1], vectorize=True
    ),
    "hessian": lambda model: hessian(lambda x: model(x, IDS[:1]).sum())(X[:1, :, :3, :3]),
    "product with a hessian": lambda model: jvp(grad(lambda x: model(x, IDS).square().sum()), (X,), (T,))[1],
}


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_are_those_of_the_dense_model(kind: str, prefer: Any) -> None:
    model, dense = made(kind, prefer)
    for name, transform in TRANSFORMS.items():
        found, expected = transform(model), transform(dense)
        assert found is not None, name
        torch.testing.assert_close(
            found, expected, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_single_samples_are_those_of_the_factors(kind: str) -> None:
    model, _ = made(kind)
    factors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(factors: dict[str, Tensor], x: Tensor, ids: Tensor) -> Tensor:
        return functional_call(model, factors, (x[None], ids[None])).square().sum()

    found = vmap(grad(loss), (None, 0, 0))(factors, X, IDS)
    for sample in range(len(X)):
        model.zero_grad()
        model(X[sample : sample + 1], IDS[sample : sample + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][sample], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_directional_derivatives_in_the_factors(kind: str) -> None:
    model, _ = made(kind)
    factors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tangents = {name: torch.randn_like(factor) for name, factor in factors.items()}
    found = jvp(lambda values: functional_call(model, values, (X, IDS)), (factors,), (tangents,))[1]
    y = model(X, IDS)
    for place in ((0, 0), (3, 5)):
        gradients = torch.autograd.grad(y[place], list(model.parameters()), retain_graph=True)
        expected = sum((g * t).sum() for g, t in zip(gradients, tangents.values(), strict=True))
        torch.testing.assert_close(found[place], expected)


def test_a_compiled_transform() -> None:
    model, dense = made("tt_matrix")
    torch.compiler.reset()
    run = torch.compile(lambda x: vmap(lambda one: model.outer(one))(x), backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run(x), dense.outer(x))


def test_experts_are_transformed_as_one() -> None:
    from tests.models.test_host_contract import experts, routed

    layer = tdkit.compress(experts().double(), Policy([Rule("*", LowRank(rank=3))], allow_growth=True), progress=False)
    x, index, weights = routed()
    inputs = x.double(), index, weights.double()
    factors = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    found = grad(lambda values: functional_call(layer, values, inputs).square().sum())(factors)
    layer(*inputs).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            found[name], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        )


class Halved(nn.Module):
    def forward(self, factor: Tensor) -> Tensor:
        return 0.5 * factor


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("kind", [name for name in KINDS if name not in OF_TENSORS])
def test_a_factor_may_have_a_parametrization(kind: str, prefer: Any) -> None:
    policy = Policy([Rule("*", decompositions.get(kind)())], budget=0.7)
    model = tdkit.prepare(
        tdkit.compress(nn.Sequential(nn.Linear(64, 64, bias=False)), policy, progress=False), prefer=prefer
    )
    x = torch.randn(600, 64)
    with torch.no_grad():
        expected = model(x)
    owner, name = next((m, n) for m in model.modules() for n, _ in m.named_parameters(recurse=False))
    nn.utils.parametrize.register_parametrization(owner, name, Halved())
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(model(x), 0.5 * expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        getattr(owner.parametrizations, name).original.mul_(2)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    nn.utils.parametrize.remove_parametrizations(owner, name)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
