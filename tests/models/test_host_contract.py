"""The hosts that tdkit ships pass the contract of a host, and so does one whose layer has several weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import RegistryError
from tdkit.models.hosts import FactorizedLayer, Host, Observer, registered
from tdkit.models.hosts.registered import dense_layer, host_of, hosts
from tdkit.models.sites import survey
from tdkit.testing import Check, check_host, host_checks


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(6, 8)
    return layer


def padded() -> nn.Module:
    layer = nn.Embedding(9, 4, padding_idx=2)
    with torch.no_grad():
        layer.weight[2] = 1.0
    return layer


def floats() -> list[Any]:
    return [torch.randn(2, 3, 8)]


def ids() -> list[Any]:
    return [torch.tensor([[0, 3, 8], [3, 1, 1]])]


def images(*size: int) -> Callable[[], list[Any]]:
    return lambda: [torch.randn(*size)]


def experts() -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=6, intermediate_size=5, num_local_experts=4, experts_implementation="eager")
    return filled(MixtralExperts(config))


def transposed_experts() -> nn.Module:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=6, intermediate_size=5, num_local_experts=4, experts_implementation="eager")
    return filled(GptOssExperts(config))


def filled(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def routed() -> list[Any]:
    index = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [0, 1]])  # no token goes to expert 2
    return [torch.randn(5, 6), index, torch.rand(5, 2)]


SHIPPED = {
    "linear": (lambda: nn.Linear(8, 6), floats),
    "linear without bias": (lambda: nn.Linear(8, 13, bias=False), floats),
    "conv1d": (conv1d, floats),
    "embedding": (lambda: nn.Embedding(9, 4), ids),
    "embedding, zero padding": (lambda: nn.Embedding(9, 4, padding_idx=5), ids),
    "embedding, other padding": (padded, ids),
    "conv1d of torch": (lambda: nn.Conv1d(4, 6, 3, padding=1), images(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), images(2, 4, 9, 8)),
    "conv2d, one position": (lambda: nn.Conv2d(4, 6, 3, bias=False), images(1, 4, 3, 3)),
    "conv2d, 1 x 1": (lambda: nn.Conv2d(4, 6, 1), images(2, 4, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), images(2, 8, 6, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), images(2, 4, 6, 5)),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(2, 1)), images(2, 4, 6, 5)),
    "conv2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), images(2, 4, 6, 5)),
    "conv2d, reflected": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), images(2, 4, 6, 5)),
    "conv2d, replicated": (lambda: nn.Conv2d(4, 6, 3, 2, padding=1, padding_mode="replicate"), images(2, 4, 6, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="circular"), images(2, 4, 6, 5)),
    "conv2d, one image without batch": (lambda: nn.Conv2d(4, 6, 3), images(4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2), padding=1, groups=1), images(2, 2, 4, 5, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), images(2, 4, 5)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 2), (1, 2), dilation=(2, 1)),
        images(2, 4, 5, 6),
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, padding=1, bias=False), images(2, 3, 4, 3)),
    "experts": (experts, routed),
    "transposed experts": (transposed_experts, routed),
}


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, id=f"{name}-{check}") for name, case in SHIPPED.items() for check in host_checks(*case)],
)
def test_contract(check: Check) -> None:
    check()


def test_every_host_is_in_the_contract() -> None:
    tried = {type(host_of(make())) for make, _ in SHIPPED.values()}
    assert {hosts.get(name) for name, owners in hosts.origins().items() if owners == ["tdkit"]} == tried


class Probe(nn.Module):
    """Shows a product to its forward hooks."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class TwoStep(nn.Module):
    """y = relu(x first^T) second^T: two weights in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(10, 8))
        self.second = nn.Parameter(torch.randn(6, 10))
        self.probes = nn.ModuleDict({"first": Probe(), "second": Probe()})

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.probes["first"](x, F.linear(x, self.first)))
        return cast(Tensor, self.probes["second"](h, F.linear(h, self.second)))


class FactorizedTwoStep(FactorizedLayer):
    host = "two_step"
    replaces = "TwoStep"

    def __init__(self, layer: TwoStep, matrices: Mapping[str, FactorizedMatrix]) -> None:
        super().__init__()
        for name in ("first", "second"):
            self.add_module(name, matrices[name]) if name in matrices else self.register_parameter(
                name, getattr(layer, name)
            )
        self.probes = nn.ModuleDict({"first": Probe(), "second": Probe()})

    @property
    def matrices(self) -> dict[str, FactorizedMatrix]:
        return {name: module for name, module in self.named_children() if isinstance(module, FactorizedMatrix)}

    def _product(self, name: str, x: Tensor) -> Tensor:
        weight = getattr(self, name)
        y = weight.linear(x) if isinstance(weight, FactorizedMatrix) else F.linear(x, weight)
        return cast(Tensor, self.probes[name](x, y))

    def forward(self, x: Tensor) -> Tensor:
        return self._product("second", torch.relu(self._product("first", x)))


class TwoStepHost(Host):
    name: ClassVar[str] = "two_step"

    def accepts(self, module: nn.Module) -> bool:
        return type(module) is TwoStep

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        return "first", "second"

    def build(
        self, module: nn.Module, matrices: Mapping[str, FactorizedMatrix], options: Mapping[str, Any]
    ) -> FactorizedLayer:
        return FactorizedTwoStep(cast(TwoStep, module), matrices)

    def undo(self, layer: FactorizedLayer) -> nn.Module:
        dense = TwoStep()
        for name in ("first", "second"):
            held = getattr(layer, name)
            is_matrix = isinstance(held, FactorizedMatrix)
            setattr(dense, name, nn.Parameter(held.dense().detach().clone()) if is_matrix else held)
        return dense

    def attach(self, module: nn.Module, weight: str, observe: Observer) -> RemovableHandle:
        probes = cast(nn.ModuleDict, module.probes)
        return probes[weight].register_forward_hook(lambda _, args, y: observe(args[0], y))


class ScaledTwice(TwoStepHost):
    """Wrong: it observes the product doubled."""

    def attach(self, module: nn.Module, weight: str, observe: Observer) -> RemovableHandle:
        probes = cast(nn.ModuleDict, module.probes)
        return probes[weight].register_forward_hook(lambda _, args, y: observe(2 * args[0], y))


class Copying(TwoStepHost):
    """Wrong: it reads the weight as a copy."""

    def canonical(self, stored: Tensor, weight: str) -> Tensor:
        return stored.clone()


class Forgetful(TwoStepHost):
    """Wrong: the weight that is not factorised becomes a new parameter."""

    def build(
        self, module: nn.Module, matrices: Mapping[str, FactorizedMatrix], options: Mapping[str, Any]
    ) -> FactorizedLayer:
        twin = TwoStep().double()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(getattr(module, name))
        return FactorizedTwoStep(twin, matrices)


Register = Callable[[type[Host]], None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
    """Registers hosts of this file as those of an installed package."""

    def add(kind: type[Host]) -> None:
        monkeypatch.setitem(hosts._built_in, kind.name, f"{__name__}:{kind.__name__}")
        monkeypatch.delitem(hosts._loaded, kind.name, raising=False)
        registered._all.cache_clear()

    yield add
    monkeypatch.undo()
    hosts._loaded.pop("two_step", None)
    registered._all.cache_clear()


def test_a_layer_with_two_weights_passes_the_contract(register: Register) -> None:
    register(TwoStepHost)
    check_host(TwoStep, floats)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ScaledTwice, "the gradient of 'first' from the rows that are observed is off"),
        (Copying, "'first' is read as a copy, not as a view"),
        (Forgetful, "'second' is not in the layer with first factorised"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_the_contract_finds_what_is_wrong(register: Register, kind: type[Host], said: str) -> None:
    register(kind)
    with pytest.raises(AssertionError, match=said):
        check_host(TwoStep, floats)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), TwoStep(), nn.Linear(6, 5))


def test_both_weights_of_a_layer_go_through_everything(register: Register, tmp_path: Path) -> None:
    register(TwoStepHost)
    dense, x = model(), torch.randn(40, 8)
    assert [site.name for site in survey(dense).sites] == ["0", "1.first", "1.second", "2"]
    policy = Policy([Rule("1.*", LowRank(rank=2)), Rule("0", LowRank(rank=3))])
    calibration = tdkit.calibrate(dense, [x], loss=lambda output, _: output.square().sum())
    second = calibration.metric("1.second")
    assert second is not None
    assert second.input is not None
    hidden = torch.relu(F.linear(dense[0](x), dense[1].first)).detach()
    torch.testing.assert_close(second.input, (hidden.T @ hidden / 40).double(), rtol=1e-5, atol=1e-6)
    compressed = tdkit.compress(dense, policy, calibration=calibration, passes=2)
    plan = tdkit.applied_plan(compressed)
    assert [step.name for step in plan.rewritten] == ["0", "1.first", "1.second"]
    loaded = tdkit.load(tdkit.save(compressed, tmp_path / "saved"), model=model())
    assert torch.equal(loaded(x), compressed(x))
    undone = dense_layer(compressed[1])
    torch.testing.assert_close(undone(compressed[0](x)), compressed[1](compressed[0](x)))


def test_one_weight_of_two_is_rewritten_and_the_other_said_to_stay(register: Register, tmp_path: Path) -> None:
    register(TwoStepHost)
    dense, x = model(), torch.randn(4, 8)
    second = dense[1].second
    compressed = tdkit.compress(dense, Policy([Rule("1.first", LowRank(rank=2))]))
    assert compressed[1].second is second
    assert tdkit.applied_plan(compressed).kept == {"1.second": "its layer has factors already"}
    loaded = tdkit.load(tdkit.save(compressed, tmp_path / "saved"), model=model())
    assert torch.equal(loaded(x), compressed(x))


@pytest.mark.parametrize("spill", [False, True], ids=["in memory", "spilled"])
def test_a_layer_with_two_weights_is_restored_when_a_fit_fails(
    register: Register, monkeypatch: pytest.MonkeyPatch, spill: bool
) -> None:
    register(TwoStepHost)
    if spill:
        monkeypatch.setattr("tdkit.models.swap.SPILL_FROM", 0)
    dense = model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with torch.no_grad():
        dense[2].weight[0, 0] = float("nan")  # the last to be fitted
    with pytest.raises(tdkit.TdkitError, match="2 holds NaN"):
        tdkit.compress(dense, Policy([Rule("*", LowRank(rank=2))]))
    assert type(dense[1]) is TwoStep
    after = dense.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name != "2.weight")
    assert len(list(dense.parameters())) == 6


def test_two_hosts_for_one_layer_are_an_error(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    register(TwoStepHost)
    monkeypatch.setitem(hosts._built_in, "other", f"{__name__}:Other")
    registered._all.cache_clear()
    with pytest.raises(RegistryError, match="the hosts 'other' and 'two_step' both accept TwoStep"):
        survey(model())


class Other(TwoStepHost):
    name: ClassVar[str] = "other"
