"""Modules of any class with parameters held as factors."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.models.hosts.in_place import InPlaceHost, InPlaceLayer, balanced
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.models.hosts.registered import dense_layer, host_of
from tdkit.models.sites import factorized_layers, num_params, replace_module, survey

SIZE = 8


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 3.0


class Shifted(nn.Embedding):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows + 2, columns)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input + 2)


class Reads(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input @ self.weight.T + self.bias


class Inherits(nn.Linear):
    pass


class WithTable(nn.Linear):
    def __init__(self) -> None:
        super().__init__(SIZE, SIZE)
        self.table = nn.Parameter(torch.randn(2, 3, SIZE))

    def forward(self, input: Tensor, *, scale: float = 1.0) -> Tensor:  # noqa: A002
        return super().forward(input) * scale + self.table.sum((0, 1)) + self.table[0, 0] - self.table[1, 1]


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(SIZE, SIZE))
        self.list = nn.ParameterList([torch.randn(SIZE, SIZE), torch.randn(SIZE)])
        self.named = nn.ParameterDict({"a": torch.randn(SIZE, SIZE)})

    def forward(self, x: Tensor) -> Tensor:
        for each in self.list:
            x = x @ each if each.ndim == 2 else x + each
        return x @ self.p @ self.named["a"] + self.p.sum()


def floats(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape, generator=torch.Generator().manual_seed(1)),)


def ids() -> tuple[Tensor, ...]:
    return (torch.tensor([[0, 5, 3], [2, 2, 1]]),)


ATTENTION: Callable[[], tuple[Tensor, ...]] = lambda: floats(2, 3, SIZE)() * 3  # noqa: E731
UNEQUAL = lambda: (*floats(2, 3, SIZE)(), *floats(2, 3, 4)(), *floats(2, 3, 6)())  # noqa: E731
parametrizations = nn.utils.parametrizations

MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "scaled": (lambda: Scaled(9, SIZE), ids),
    "shifted": (lambda: Shifted(9, SIZE), ids),
    "reads": (lambda: Reads(SIZE, SIZE), floats(3, SIZE)),
    "inherits": (lambda: Inherits(SIZE, SIZE), floats(3, SIZE)),
    "table": (WithTable, floats(3, SIZE)),
    "bare": (Bare, floats(3, SIZE)),
    "lstm": (lambda: nn.LSTM(SIZE, SIZE, 2, bidirectional=True, batch_first=True), floats(2, 3, SIZE)),
    "projected lstm": (lambda: nn.LSTM(SIZE, SIZE, proj_size=4), floats(2, 3, SIZE)),
    "gru": (lambda: nn.GRU(SIZE, SIZE), floats(2, 3, SIZE)),
    "rnn": (lambda: nn.RNN(SIZE, SIZE), floats(2, 3, SIZE)),
    "lstm cell": (lambda: nn.LSTMCell(SIZE, SIZE), floats(2, SIZE)),
    "gru cell": (lambda: nn.GRUCell(SIZE, SIZE), floats(2, SIZE)),
    "attention": (lambda: nn.MultiheadAttention(SIZE, 2), ATTENTION),
    "attention, other sizes": (lambda: nn.MultiheadAttention(SIZE, 2, kdim=4, vdim=6), UNEQUAL),
    "bilinear": (lambda: nn.Bilinear(SIZE, SIZE, 5), lambda: floats(3, SIZE)() * 2),
    "embedding bag": (lambda: nn.EmbeddingBag(9, SIZE), ids),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(SIZE, SIZE)), floats(3, SIZE)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(SIZE, SIZE)), floats(3, SIZE)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(SIZE, SIZE)), floats(3, SIZE)),
    "linear": (lambda: nn.Linear(SIZE, SIZE), floats(3, SIZE)),
    "embedding": (lambda: nn.Embedding(9, SIZE), ids),
}


def tensor_of(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def built(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, inputs = MODULES[name]
    return make().eval(), inputs()


def full_rank(model: nn.Module) -> Policy:
    rules = [Rule(site.name, LowRank(rank=min(site.shape))) for site in survey(model).sites]
    return Policy(rules, allow_growth=True)


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_full_rank_factors_compute_the_same_and_come_back(name: str, wrapped: bool) -> None:
    module, inputs = built(name)
    model = nn.ModuleDict({"m": module}) if wrapped else module
    expected = tensor_of(module(*inputs)).detach()
    names = {parameter: value.shape for parameter, value in module.named_parameters()}
    sites = len(survey(model).sites)
    assert sites
    assert not survey(model).untouchable
    tdkit.compress(model, full_rank(model), progress=False)
    layer = model["m"] if isinstance(model, nn.ModuleDict) else model
    torch.testing.assert_close(tensor_of(layer(*inputs)), expected, rtol=1e-4, atol=1e-5)
    assert sum(len(found.matrices) for _, found in factorized_layers(model)) == sites
    dense = copy.deepcopy(model)
    for place, found in list(factorized_layers(dense)):
        replace_module(dense, place, dense_layer(found))
    again = dense["m"] if isinstance(dense, nn.ModuleDict) else dense
    torch.testing.assert_close(tensor_of(again(*inputs)), expected, rtol=1e-4, atol=1e-5)
    if "norm" not in name and name != "orthogonal":  # these come back as plain layers
        assert {parameter: value.shape for parameter, value in again.named_parameters()} == names


@pytest.mark.parametrize("name", MODULES)
def test_a_failed_compression_leaves_the_module_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = built(name)
    before, expected = module.state_dict(), tensor_of(module(*inputs)).detach()
    kind, identities = type(module), [id(p) for p in module.parameters()]

    def stop(_: nn.Module) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tdkit.models.swap.follow_ties", stop)
    with pytest.raises(KeyboardInterrupt):
        tdkit.compress(module, full_rank(module), progress=False)
    assert type(module) is kind
    assert [id(p) for p in module.parameters()] == identities
    assert module.state_dict().keys() == before.keys()
    assert torch.equal(tensor_of(module(*inputs)), expected)


@pytest.mark.parametrize("name", MODULES)
def test_saved_and_loaded_bit_for_bit_then_trained(name: str, tmp_path: Path) -> None:
    module, inputs = built(name)
    tdkit.compress(module, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    expected = tensor_of(module(*inputs))
    tdkit.save(module, tmp_path / "saved")
    torch.manual_seed(7)
    fresh = MODULES[name][0]()
    loaded = tdkit.load(tmp_path / "saved", model=fresh)
    assert loaded is fresh
    assert torch.equal(tensor_of(loaded(*inputs)), expected)
    loaded.train()
    tensor_of(loaded(*inputs)).square().sum().backward()
    factors = [p for _, layer in factorized_layers(loaded) for m in layer.matrices.values() for p in m.parameters()]
    used = [p.grad for p in factors if p.grad is not None]
    assert used
    assert all(bool(torch.isfinite(grad).all()) for grad in used)


@pytest.mark.parametrize("name", MODULES)
def test_copies_work_alone(name: str) -> None:
    module, inputs = built(name)
    tdkit.compress(module, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    expected = tensor_of(module(*inputs)).detach()
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(tensor_of(copied(*inputs)), expected)
    assert type(copied) is type(module)


def test_a_pickle_makes_the_class_again() -> None:
    module, inputs = built("lstm")
    tdkit.compress(module, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(tensor_of(again(*inputs)), tensor_of(module(*inputs)))


def test_super_forward_multiplies_by_the_factors() -> None:
    module, inputs = built("scaled")
    tdkit.compress(module, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    calls: list[int] = []
    module.matrix.register_forward_hook(lambda *_: calls.append(1))
    module(*inputs)
    assert calls == [1]
    assert isinstance(module, Scaled)
    assert InPlaceHost(host_of(nn.Embedding(2, 2))).computed(Scaled(2, 2), "weight") == "by factors"
    assert InPlaceHost(host_of(nn.Linear(2, 2))).computed(Reads(2, 2), "weight") == "dense"


def test_a_parameter_is_computed_once_per_forward_and_cached_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = built("bare")
    tdkit.compress(module, Policy([Rule("p", LowRank(rank=2))]), progress=False)
    matrix = module.matrices["p"]
    dense, calls = matrix.dense, []

    def counted() -> Tensor:
        calls.append(1)
        return dense()

    monkeypatch.setattr(matrix, "dense", counted)
    with torch.no_grad():
        module(*inputs)
        assert len(calls) == 1  # forward reads it twice
        tdkit.prepare(module, prefer="memory")
        module(*inputs)
        module(*inputs)
        assert len(calls) == 3
        tdkit.prepare(module, prefer="speed")
        module(*inputs)
        module(*inputs)
        assert len(calls) == 4
        matrix.left.mul_(2)
        module(*inputs)
        assert len(calls) == 5


def test_the_parameter_is_read_only_and_the_signature_stays() -> None:
    module, _ = built("table")
    signature = inspect.signature(module.forward)
    tdkit.compress(module, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    assert inspect.signature(module.forward) == signature
    for name in ("table", "weight"):
        with pytest.raises(AttributeError, match=f"the {name} of a FactorizedWithTable is read-only"):
            setattr(module, name, nn.Parameter(torch.zeros(2, 2)))


def test_one_parameter_of_several_is_rewritten() -> None:
    module, inputs = built("table")
    weight, expected = module.weight, module(*inputs, scale=2.0).detach()
    tdkit.compress(module, Policy([Rule("table", LowRank(rank=6))], allow_growth=True), progress=False)
    assert module.weight is weight
    torch.testing.assert_close(module(*inputs, scale=2.0), expected, rtol=1e-4, atol=1e-5)
    module.weight = nn.Parameter(torch.zeros(SIZE, SIZE))
    assert not module(*inputs).allclose(expected)


def test_a_linear_with_another_parameter_keeps_it() -> None:
    layer = nn.Linear(SIZE, SIZE)
    layer.register_parameter("gain", nn.Parameter(torch.ones(SIZE)))
    layer.register_buffer("mask", torch.ones(2))
    model = nn.Sequential(layer)
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    assert {"0.gain", "0.mask", "0.bias"} <= set(model.state_dict())


def test_the_effective_weight_of_a_parametrization_counts_what_vanishes() -> None:
    module, _ = built("weight norm")
    before = num_params(module)
    plan = tdkit.plan(module, Policy([Rule("*", LowRank(rank=2))]))
    tdkit.compress(module, plan, progress=False)
    assert plan.params_before == before == SIZE * SIZE + 2 * SIZE
    assert plan.params_after == num_params(module) == 4 * SIZE + SIZE
    assert isinstance(module, FactorizedLinear)


def test_an_old_weight_norm_keeps_its_hook() -> None:
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="weight_norm"):
        module = nn.utils.weight_norm(nn.Linear(SIZE, SIZE))
    x = torch.randn(3, SIZE)
    expected = module(x).detach()
    tdkit.compress(module, Policy([Rule("weight_v", LowRank(rank=SIZE))], allow_growth=True), progress=False)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_float64_gradients_of_every_factor() -> None:
    torch.manual_seed(0)
    module = nn.GRU(3, 2).double()
    tdkit.compress(module, Policy([Rule("*", LowRank(rank=1))], allow_growth=True), progress=False)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]

    def call(*values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))[0]
        return output

    assert torch.autograd.gradcheck(call, [p.detach().clone().requires_grad_() for p in module.parameters()])


def test_a_compiled_wrapper_is_compressed_and_saved_under_the_plain_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
    wrapper = torch.compile(model, backend="eager")
    assert tdkit.compress(wrapper, Policy([Rule("0", LowRank(rank=2))]), progress=False) is wrapper
    x = torch.randn(2, SIZE)
    expected = wrapper(x)
    tdkit.save(wrapper, tmp_path / "saved")
    loaded = tdkit.load(tmp_path / "saved", model=nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)))
    torch.testing.assert_close(loaded(x), expected)
    assert set(loaded.state_dict()) == {"0.matrix.left", "0.matrix.right", "0.bias", "1.weight", "1.bias"}


def test_a_compiled_part_calls_the_factors() -> None:
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU())
    model[0] = torch.compile(model[0], backend="eager")
    x = torch.randn(2, SIZE)
    before = model(x)
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=1))]), progress=False)
    dense = F.linear(x, model[0]._orig_mod.matrix.dense(), model[0]._orig_mod.bias).relu()
    torch.testing.assert_close(model(x), dense)
    assert not model(x).allclose(before)


def test_an_old_spectral_norm_says_why_it_stays() -> None:
    module = nn.utils.spectral_norm(nn.Linear(SIZE, SIZE))
    assert "parametrizations.spectral_norm" in survey(module).untouchable[0].reason


def test_a_parameter_list_compiles() -> None:
    module, inputs = built("bare")
    tdkit.compress(module, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    compiled = torch.compile(module, backend="eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs))


def test_hooks_of_a_device_map_stay_and_call_the_factors() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = nn.Sequential(nn.Linear(SIZE, SIZE))
    hooked = add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu"))
    x = torch.randn(2, SIZE)
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    assert model[0] is hooked
    assert hasattr(model[0], "_hf_hook")
    calls: list[int] = []
    model[0].matrix.register_forward_hook(lambda *_: calls.append(1))
    expected = F.linear(x, model[0].matrix.dense(), model[0].bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert calls == [1]


@pytest.mark.parametrize("name", ["scaled", "reads", "bare", "lstm", "attention", "bilinear", "weight norm", "linear"])
def test_every_weight_is_calibrated(name: str) -> None:
    module, inputs = built(name)
    grads = [p.grad for p in module.parameters()]
    calibration = tdkit.calibrate(module, [inputs] * 2, loss=lambda output, _: tensor_of(output).square().sum())
    sites = survey(module).sites
    assert set(calibration.names) == {site.name for site in sites}
    for site in sites:
        metric = calibration.metric(site.name)
        assert metric is not None
        assert metric.input is not None
        assert metric.output is not None
        assert metric.squared_error(site.weight.detach().flatten(1)) > 0
    assert [p.grad for p in module.parameters()] == grads


def test_gradients_of_a_weight_give_the_scale_of_its_rows() -> None:
    """One row per batch and a linear loss: the moments of the weight's gradient are exactly those of the rows."""
    torch.manual_seed(0)

    class Matmul(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return (self.weight @ input.T).T

    plain, other = nn.Sequential(nn.Linear(5, 4, bias=False)), nn.Sequential(Matmul(5, 4, bias=False))
    other.load_state_dict(plain.state_dict())
    batches = list(torch.randn(6, 1, 5))
    errors = []
    for model in (plain, other):
        metric = tdkit.calibrate(model, batches, loss=lambda y, _: (y * torch.arange(4)).sum()).metric("0")
        errors.append(metric.squared_error(torch.randn(4, 5, generator=torch.Generator().manual_seed(3))))
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_an_in_place_layer_measures_again_after_compression() -> None:
    module, inputs = built("reads")
    tdkit.compress(module, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    assert isinstance(module, InPlaceLayer)
    seen: list[Tensor] = []
    handle = module.builder.attach_gradient(module, "weight", seen.append)
    module(*inputs).sum().backward()
    handle.remove()
    module(*inputs).sum().backward()
    assert [tuple(grad.shape) for grad in seen] == [(SIZE, SIZE)]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_a_tensor_becomes_the_squarest_matrix(shape: list[int]) -> None:
    rows, columns = balanced(tuple(shape))
    size = torch.Size(shape).numel()
    assert rows * columns == size
    splits = [torch.Size(shape[:k]).numel() for k in range(1, len(shape))]
    assert max(rows, columns) == min(max(split, size // split) for split in splits)
