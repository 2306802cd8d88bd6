"""A cached weight: when it is used, when it is built again, and where it must never appear."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import Kronecker, LowRank, PermutedKronecker, Policy, Rule, TTMatrix
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import OptionError
from tdkit.models.preparation import cached_bytes, factorized_matrices, prepare
from tdkit.products.cached_tensor import CachedTensor
from tdkit.products.cost import CACHED
from tdkit.products.dispatch import Dispatcher

KINDS = [
    LowRank(rank=60),
    Kronecker(terms=40, a=(8, 8), b=(8, 8)),
    PermutedKronecker(terms=40, a=(8, 8), b=(8, 8)),
    TTMatrix(ranks=16),
]


def model_of(kind: tdkit.Decomposition, size: int = 64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size))
    return tdkit.compress(model, Policy([Rule("*", kind)], allow_growth=True), progress=False)


def matrix_of(model: nn.Module) -> FactorizedMatrix:
    return factorized_matrices(model)[0]


def cached_model(kind: tdkit.Decomposition) -> tuple[nn.Module, Tensor, Tensor]:
    """A prepared model with cached weights, its input and the output of its factors."""
    model = model_of(kind).eval()
    x = torch.randn(512, 64)
    with torch.inference_mode():
        expected = model(x)
        prepare(model)
        torch.testing.assert_close(model(x), expected)
    assert matrix_of(model).path(512).name == CACHED
    assert cached_bytes(model) == 2 * 64 * 64 * 4
    return model, x, expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_can_cache_its_weight(kind: tdkit.Decomposition) -> None:
    cached_model(kind)


@pytest.mark.parametrize(("size", "strides"), [((96, 64), (1, 96)), ((64, 96), (96, 1)), ((64, 64), (1, 64))])
def test_for_one_token_a_cached_weight_lies_along_its_longer_side(
    size: tuple[int, int], strides: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    matrix = TTMatrix(ranks=16).empty(size).eval()
    for core in matrix.parameters():
        nn.init.normal_(core, std=0.3)
    cache = CachedTensor()
    tensors = tuple(matrix.parameters())
    many = cache.get(tensors, torch.float32, matrix.dense)
    assert many is not None
    assert many.stride() == (size[1], 1)
    few = cache.get(tensors, torch.float32, matrix.dense, few=True)
    assert few is not None
    assert few.stride() == strides
    assert torch.equal(few, many)
    assert cache.get(tensors, torch.float32, matrix.dense) is few  # and stays so: prompts and tokens alternate
    assert cache.get(tensors, torch.float32, matrix.dense, few=True) is few
    assert cache.bytes == size[0] * size[1] * 4
    cache.clear()
    again = cache.get(tensors, torch.float32, matrix.dense, few=True)
    assert again is not None
    assert again.stride() == strides


def test_a_low_rank_pair_caches_its_factors_with_the_rank_padded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64, bias=True))
    model = tdkit.compress(model, Policy([Rule("*", LowRank(rank=5))]), progress=False)
    x = torch.randn(2, 256, 96)
    with torch.inference_mode():
        expected = model(x)
        prepare(model)
        torch.testing.assert_close(model(x), expected)
        assert cached_bytes(model) == 16 * (64 + 96) * 4
        torch.testing.assert_close(model(x[:1, :3]), expected[:1, :3])  # few tokens use the factors themselves
        assert cached_bytes(copy.deepcopy(model)) == 0
    with torch.no_grad():
        matrix_of(model).right.mul_(2)
    bias = model[0].bias
    with torch.inference_mode():
        torch.testing.assert_close(model(x) - bias, 2 * (expected - bias), rtol=1e-4, atol=1e-5)
    assert not [name for name in model.state_dict() if "padded" in name]
    model.train()
    assert cached_bytes(model) == 0
    prepare(model, prefer="memory")
    with torch.inference_mode():
        model(x)
    assert cached_bytes(model) == 0


def test_nothing_is_cached_before_a_call_needs_it() -> None:
    model = prepare(model_of(TTMatrix(ranks=16)))
    assert cached_bytes(model) == 0
    assert not model.training


def test_prefer_memory_caches_nothing_and_frees_what_was() -> None:
    model, x, expected = cached_model(TTMatrix(ranks=16))
    prepare(model, prefer="memory")
    assert cached_bytes(model) == 0
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    assert cached_bytes(model) == 0


def test_calls_in_a_row_choose_no_path_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, expected = cached_model(TTMatrix(ranks=16))

    def chosen(*args: object, **kwargs: object) -> None:
        raise AssertionError("a path was chosen")

    monkeypatch.setattr(Dispatcher, "table", chosen)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
        for other in (x[:200], x.double()):
            with pytest.raises(AssertionError, match="a path was chosen"):
                model(other)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(AssertionError, match="a path was chosen"):
            model(x)
    with pytest.raises(AssertionError, match="a path was chosen"):
        model(x)  # may need gradients
    monkeypatch.undo()
    with torch.inference_mode():
        for rows in (200, 300):
            model(x[:rows])
        monkeypatch.setattr(Dispatcher, "table", chosen)
        for rows in (512, 200, 300):  # calls of sizes that take turns are all known
            torch.testing.assert_close(model(x[:rows]), expected[:rows])
    matrix_of(model).train()
    matrix_of(model).eval()
    with torch.inference_mode(), pytest.raises(AssertionError, match="a path was chosen"):
        model(x)


def change_in_place(matrix: FactorizedMatrix) -> None:
    with torch.no_grad():
        next(matrix.parameters()).mul_(2)


def change_the_data(matrix: FactorizedMatrix) -> None:
    factor = next(matrix.parameters())
    factor.data = factor.data * 2


def change_the_parameter(matrix: FactorizedMatrix) -> None:
    for name, factor in list(matrix.named_parameters()):
        owner = matrix.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(factor.detach() * 2))


def change_by_optimizer(matrix: FactorizedMatrix) -> None:
    optimizer = torch.optim.SGD(matrix.parameters(), lr=1.0)
    for factor in matrix.parameters():
        factor.grad = torch.ones_like(factor)
    optimizer.step()


def change_by_loading(matrix: FactorizedMatrix) -> None:
    matrix.load_state_dict({name: tensor * 2 for name, tensor in matrix.state_dict().items()})


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_the_data, change_the_parameter, change_by_optimizer, change_by_loading],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("kind", [LowRank(rank=60), TTMatrix(ranks=16)], ids=lambda kind: kind.name)
def test_a_change_of_the_factors_is_seen(change, kind: tdkit.Decomposition) -> None:
    model, x, before = cached_model(kind)
    change(matrix_of(model))
    with torch.inference_mode():
        after = model(x)
        expected = prepare(copy.deepcopy(model), prefer="memory")(x)
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(after, before, atol=1e-3)
    assert cached_bytes(model) > 0


def test_permutations_count_as_factors() -> None:
    model, x, _ = cached_model(PermutedKronecker(terms=40, a=(8, 8), b=(8, 8)))
    matrix = matrix_of(model)
    matrix.row_order.copy_(matrix.row_order.flip(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), prepare(copy.deepcopy(model), prefer="memory")(x))


def test_it_is_never_saved_copied_or_pickled() -> None:
    model, x, expected = cached_model(TTMatrix(ranks=16))
    reference = model_of(TTMatrix(ranks=16))
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert sum(b.numel() for b in model.buffers()) == sum(b.numel() for b in reference.buffers())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert cached_bytes(twin) == 0
        assert matrix_of(twin).prefer == "speed"
        with torch.inference_mode():
            torch.testing.assert_close(twin(x), expected)
        assert cached_bytes(twin) > 0


def test_train_drops_it_and_eval_builds_it_again() -> None:
    model, x, expected = cached_model(TTMatrix(ranks=16))
    model.train()
    assert cached_bytes(model) == 0
    model(x).sum().backward()
    assert cached_bytes(model) == 0
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert cached_bytes(model) > 0


def test_it_survives_to() -> None:
    model, x, expected = cached_model(TTMatrix(ranks=16))
    model.to(torch.float64)
    assert cached_bytes(model) == 0
    with torch.inference_mode():
        torch.testing.assert_close(model(x.double()), expected.double(), rtol=1e-4, atol=1e-5)
    assert cached_bytes(model) == 2 * 64 * 64 * 8


def test_gradients_of_the_factors_are_not_lost_in_eval_mode() -> None:
    model, x, _ = cached_model(TTMatrix(ranks=16))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_of_the_input_pass_a_cached_weight() -> None:
    model, x, _ = cached_model(TTMatrix(ranks=16))
    model.requires_grad_(False)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    model(inputs[0]).square().sum().backward()
    assert cached_bytes(model) > 0
    prepare(model, prefer="memory")(inputs[1]).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_autocast_caches_the_weight_in_its_dtype() -> None:
    model, x, expected = cached_model(TTMatrix(ranks=16))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    assert cached_bytes(model) == 2 * 64 * 64 * 2


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_model_compressed_in_inference_mode_caches_its_weights(kind: tdkit.Decomposition) -> None:
    with torch.inference_mode():
        model = model_of(kind)
        x = torch.randn(512, 64)
        expected = model(x)
        prepare(model)
        torch.testing.assert_close(model(x), expected)
        assert matrix_of(model).path(512).name == CACHED
        assert cached_bytes(model) == 2 * 64 * 64 * 4
        for factor in matrix_of(model).parameters():
            factor.mul_(2)
        torch.testing.assert_close(model(x), prepare(copy.deepcopy(model), prefer="memory")(x))
        assert not torch.allclose(model(x), expected, atol=1e-3)


def test_a_model_moved_in_inference_mode_caches_its_weights() -> None:
    model = model_of(PermutedKronecker(terms=40, a=(8, 8), b=(8, 8)))
    with torch.inference_mode():
        prepare(model).double()
        model(torch.randn(512, 64).double())
    assert cached_bytes(model) == 2 * 64 * 64 * 8
    assert all(p.requires_grad for p in matrix_of(model).parameters())


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_factors_that_are_inference_tensors_are_replaced_by_ordinary_ones(
    kind: tdkit.Decomposition, inside: bool
) -> None:
    with torch.inference_mode():
        model = copy.deepcopy(model_of(kind))
        x = torch.randn(512, 64)
        expected = model(x)
    model.requires_grad_(False)
    before = model.state_dict()
    assert all(tensor.is_inference() for tensor in matrix_of(model).tensors())
    with torch.inference_mode(inside):
        prepare(model)
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in matrix_of(model).tensors())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.stride() == before[name].stride()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    assert cached_bytes(model) == 2 * 64 * 64 * 4


def test_a_factor_that_two_matrices_share_is_still_shared() -> None:
    with torch.inference_mode():
        one, other = (copy.deepcopy(TTMatrix(ranks=16).fit(torch.randn(64, 64))) for _ in range(2))
    other.cores = one.cores
    prepare(nn.ModuleList([one, other]))
    assert one.cores is other.cores
    assert not one.cores[0].is_inference()
    left, right = (copy.deepcopy(OnlyDense()) for _ in range(2))
    with torch.inference_mode():
        left.row = right.row = nn.Parameter(torch.randn(1, 4))
    prepare(nn.ModuleList([left, right]))
    assert left.row is right.row
    assert not left.row.is_inference()


def test_inference_tensors_are_multiplied_by_their_factors_and_the_path_says_so() -> None:
    with torch.inference_mode():
        model = copy.deepcopy(prepare(model_of(TTMatrix(ranks=16))))
        x = torch.randn(512, 64)
        before = model(x)
        for factor in matrix_of(model).parameters():
            factor.mul_(2)
        assert not torch.allclose(model(x), before, atol=1e-3)
        assert cached_bytes(model) == 0
        assert matrix_of(model).path(512).name == matrix_of(model).path(512, prefer="memory").name != CACHED


@pytest.mark.parametrize("autocast_waits", [True, False])
def test_threads_under_different_autocast_do_not_spoil_each_others_weight(autocast_waits: bool) -> None:
    """One thread builds its weight; meanwhile the other one builds, caches and uses its own."""
    building, done = threading.Event(), threading.Event()

    class Waiting(OnlyDense):
        def dense(self) -> Tensor:
            if torch.is_autocast_enabled("cpu") is autocast_waits and not done.is_set():
                building.set()
                assert done.wait(60)
            return super().dense()

    matrix = prepare(Waiting())
    x = torch.randn(5, 4)
    expected = (x @ matrix.row.T @ matrix.column.T).detach()
    found: dict[bool, Tensor] = {}

    def call(autocast: bool) -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found[autocast] = matrix.linear(x)

    waiting = threading.Thread(target=call, args=(autocast_waits,))
    waiting.start()
    assert building.wait(60)
    call(not autocast_waits)
    done.set()
    waiting.join(60)
    for autocast in (False, True, False, True):
        call(autocast)
        assert found[autocast].dtype is (torch.bfloat16 if autocast else torch.float32)
        torch.testing.assert_close(found[autocast].float(), expected, rtol=0.05, atol=0.05)


def test_a_factor_that_changes_while_its_weight_is_built_is_seen() -> None:
    class Changing(OnlyDense):
        def dense(self) -> Tensor:
            weight = super().dense()
            if self.built == 1:
                self.row.mul_(2)
            return weight

    matrix = prepare(Changing())
    x = torch.randn(5, 4)
    with torch.inference_mode():
        matrix.linear(x)
        torch.testing.assert_close(matrix.linear(x), (x @ matrix.row.T) @ matrix.column.T)


def test_a_compiled_model_computes_from_its_factors() -> None:
    model, x, expected = cached_model(TTMatrix(ranks=16))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
        change_in_place(matrix_of(model))
        torch.testing.assert_close(compiled(x), prepare(copy.deepcopy(model), prefer="memory")(x))


def test_another_preference_is_refused() -> None:
    with pytest.raises(
        OptionError, match="prefer='sped' must be one of 'speed', 'auto', 'memory'; did you mean 'speed'"
    ):
        prepare(nn.Linear(2, 2), prefer="sped")


class OnlyDense(FactorizedMatrix):
    """A plugin's matrix that writes nothing but `dense`."""

    def __init__(self) -> None:
        super().__init__(LowRank(rank=1), (3, 4))
        self.column = nn.Parameter(torch.randn(3, 1))
        self.row = nn.Parameter(torch.randn(1, 4))
        self.built = 0

    def dense(self) -> Tensor:
        self.built += 1
        return self.column @ self.row


def test_the_weight_of_a_plugin_that_only_writes_dense_is_cached_too() -> None:
    matrix = OnlyDense()
    x, bias = torch.randn(2, 5, 4), torch.randn(3)
    expected = x @ matrix.dense().T + bias
    torch.testing.assert_close(matrix.linear(x, bias), expected)
    assert matrix.path(10).name == "dense"
    prepare(matrix)
    matrix.built = 0
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(matrix.linear(x, bias), expected)
    assert matrix.built == 1
    assert matrix.path(10).name == CACHED
