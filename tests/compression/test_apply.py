"""compress: all or nothing, ties kept, foreign code that reads the model keeps working."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

import tdkit
from tdkit import LowRank, Plan, Policy, Rule
from tdkit.decompositions.base import Decomposition, FactorizedMatrix
from tdkit.decompositions.low_rank import LowRankMatrix
from tdkit.decompositions.registered import decompositions
from tdkit.errors import CheckpointError, OptionError, PolicyError
from tdkit.fitting.metric import Metric
from tdkit.models.hosts.embedding import FactorizedEmbedding
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.models.sites import factorized_groups, num_params
from tdkit.support.aside import Aside
from tests.kinds import OF_MATRICES

EVERY = [decompositions.get(name)() for name in OF_MATRICES]
by_name = pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.name)
half = Policy([Rule("*", LowRank())], budget=0.5)


@dataclass(frozen=True, kw_only=True)
class Failing(LowRank):
    """Low rank until the third fit, which raises `what`."""

    what: type[BaseException] = ValueError

    def fit(self, weight: Tensor, metric: Metric | None = None) -> LowRankMatrix:
        fits.append(weight)
        if len(fits) == 3:
            raise self.what("in the middle")
        return super().fit(weight, metric)


fits: list[Tensor] = []


@by_name
def test_the_same_model_comes_back_smaller_and_works(kind: Decomposition, gpt2: Any, ids: Tensor) -> None:
    model = tdkit.compress(gpt2, Policy([Rule("*", kind)], budget=0.6))
    assert model is gpt2
    assert num_params(model) <= 0.6 * tdkit.applied_plan(model).params_before
    logits = model(ids).logits
    assert logits.shape == (2, 7, 60)
    assert torch.isfinite(logits).all()


@by_name
def test_compression_is_deterministic(kind: Decomposition, tied: Any) -> None:
    twin = copy.deepcopy(tied)
    policy = Policy([Rule("*", kind)], budget=0.5)
    tdkit.compress(tied, policy)
    torch.manual_seed(99)
    tdkit.compress(twin, policy)
    first, second = tied.state_dict(), twin.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("what", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(what: type[BaseException], gpt2: Any) -> None:
    fits.clear()
    modules = dict(gpt2.named_modules(remove_duplicate=False))
    state = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in gpt2.named_parameters()}
    with pytest.raises(what, match="in the middle"):
        tdkit.compress(gpt2, Policy([Rule("*", Failing(rank=2, what=what))]))
    assert len(fits) == 3
    assert dict(gpt2.named_modules(remove_duplicate=False)) == modules
    assert {name: id(parameter) for name, parameter in gpt2.named_parameters()} == parameters
    assert all(torch.equal(tensor, state[name]) for name, tensor in gpt2.state_dict().items())


def test_an_exception_while_layers_are_swapped_puts_them_back(tied: Any) -> None:
    class Guarded(nn.ModuleDict):
        """Refuses to let its last layer be replaced, as a model with checks of its own may."""

        def __setattr__(self, name: str, value: object) -> None:
            if name == "b" and isinstance(value, FactorizedLinear):
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    model = Guarded({"a": nn.Linear(12, 12), "tied": tied, "b": nn.Linear(12, 12)})
    modules = dict(model.named_modules(remove_duplicate=False))
    with pytest.raises(KeyboardInterrupt):
        tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]))
    assert dict(model.named_modules(remove_duplicate=False)) == modules


def test_nan_weights_are_told_and_nothing_changes(tied: Any) -> None:
    with torch.no_grad():
        tied.down.weight[0, 0] = float("nan")
    with pytest.raises(PolicyError, match=r"down holds NaN or infinite weights: repair it, or keep it with a rule"):
        tdkit.compress(tied, half)
    assert type(tied.up) is nn.Linear


def test_a_plan_for_another_model_is_told(tied: Any, gpt2: Any) -> None:
    with pytest.raises(PolicyError, match=r"the plan's layer embed \(40x24\) is not in this model: plan again"):
        tdkit.compress(gpt2, tdkit.plan(tied, half))
    plan = tdkit.plan(tied, half)
    tdkit.compress(tied, plan)
    with pytest.raises(PolicyError, match="is not in this model"):
        tdkit.compress(tied, plan)


@by_name
def test_tied_weights_stay_one_matrix(kind: Decomposition, tied: Any, ids: Tensor) -> None:
    tdkit.compress(tied, Policy([Rule("embed", kind)], budget=0.8))
    assert isinstance(tied.embed, FactorizedEmbedding)
    assert isinstance(tied.head, FactorizedLinear)
    assert tied.embed.matrix is tied.head.matrix
    tied(ids).square().mean().backward()
    with torch.no_grad():
        for parameter in tied.parameters():
            parameter -= 0.1 * parameter.grad
    assert torch.equal(tied.embed.weight, tied.head.weight)


def test_one_module_under_two_names_stays_one_module() -> None:
    layer = nn.Linear(12, 12)
    model = nn.ModuleDict({"a": layer, "b": layer})
    tdkit.compress(model, Policy([Rule("a", LowRank(rank=2))]))
    assert model["a"] is model["b"]
    assert isinstance(model["a"], FactorizedLinear)


def test_part_of_a_model_can_be_compressed_after_another(tied: Any) -> None:
    tdkit.compress(tied, Policy([Rule("up", LowRank(rank=2))]))
    up = tied.up
    tdkit.compress(tied, Policy([Rule("*", LowRank(rank=3))]))
    assert tied.up is up
    assert tied.down.matrix.decomposition == LowRank(rank=3)


def test_a_compressed_model_trains(gpt2: Any, ids: Tensor) -> None:
    tdkit.compress(gpt2.train(), half)
    optimizer = torch.optim.AdamW(gpt2.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = gpt2(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_a_deep_copy_is_independent(tied: Any, ids: Tensor) -> None:
    tdkit.compress(tied, half)
    twin = copy.deepcopy(tied)
    assert torch.equal(twin(ids), tied(ids))
    assert twin.embed.matrix is twin.head.matrix
    with torch.no_grad():
        twin.embed.matrix.left.zero_()
    assert tied.embed.matrix.left.any()


@dataclass(frozen=True, kw_only=True)
class Elsewhere(LowRank):
    """Low rank that notes where it is asked to fit: the `meta` device computes nothing, and stands for a GPU."""

    def fit(self, weight: Tensor, metric: Metric | None = None) -> LowRankMatrix:
        given = (weight, metric.input, metric.output) if metric else (weight,)
        places.append({str(tensor.device) for tensor in given if tensor is not None})
        return super().fit(torch.randn(weight.shape, dtype=weight.dtype))

    def error(self, weight: Tensor, matrix: FactorizedMatrix, metric: Metric | None = None) -> float:
        return 0.5 if weight.is_meta else super().error(weight, matrix, metric)


places: list[set[str]] = []


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_fit_runs_on_the_device_asked_for(
    tied: Any, ids: Tensor, calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="device='meta' holds no numbers"):
        tdkit.compress(tied, half, device="meta")
    monkeypatch.setattr("tdkit.compression.apply.check_device", lambda device: device)  # no other device is here
    places.clear()
    calibration = tdkit.calibrate(tied, [ids]) if calibrated else None
    policy = Policy([Rule("*", Elsewhere(rank=2))])
    tdkit.compress(copy.deepcopy(tied), policy, calibration=calibration)
    tdkit.compress(tied, policy, calibration=calibration, device="meta")
    assert places == [{"cpu"}] * 3 + [{"meta"}] * 3
    assert {p.device.type for p in tied.parameters()} == {"cpu"}


@pytest.mark.gpu
def test_batches_and_generated_text_are_computed_on_the_device_asked_for(llama: Any) -> None:
    used: set[str] = set()
    for layer in (llama.lm_head, llama.model.layers[0].mlp.down_proj):
        layer.register_forward_hook(lambda _, __, output: used.add(output.device.type))
    policy = Policy([Rule("*.mlp.*", LowRank(rank=2))])
    ids = torch.randint(0, 60, (2, 12))
    tdkit.compress(copy.deepcopy(llama), policy, calibration=[ids], device="cuda")
    tdkit.calibrate(llama, [ids], self_generated=24, context=12, device="cuda")
    assert used == {"cuda"}
    assert {parameter.device.type for parameter in llama.parameters()} == {"cpu"}


def test_the_model_is_moved_to_the_device_asked_for_to_calibrate() -> None:
    moves: list[str] = []

    class Recorded(nn.Sequential):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            moves.append(str(args[0]))
            return super().to(*args, **kwargs)

    model, policy = Recorded(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), Policy([Rule("*", LowRank(rank=2))])
    data, loss = [torch.randn(9, 6)], lambda y, _: y.square().sum()
    tdkit.compress(copy.deepcopy(model), policy, calibration=data, loss=loss)
    assert not moves
    tdkit.compress(model, policy, calibration=data, loss=loss, device="cpu")
    assert "cpu" in moves


@pytest.mark.parametrize("make", ["gpt2", "llama"])
class TestTransformers:
    """What transformers itself does to a model must go on working."""

    @pytest.fixture
    def model(self, make: str, request: pytest.FixtureRequest) -> Any:
        return tdkit.compress(request.getfixturevalue(make), half)

    def test_generation(self, model: Any, ids: Tensor) -> None:
        out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert out.shape[1] > ids.shape[1]

    def test_cached_decoding_equals_a_whole_pass(self, model: Any, ids: Tensor) -> None:
        with torch.no_grad():
            whole = model(ids).logits
            past = model(ids[:, :-1], use_cache=True).past_key_values
            step = model(ids[:, -1:], past_key_values=past).logits
        torch.testing.assert_close(step[:, 0], whole[:, -1], rtol=1e-4, atol=1e-5)

    def test_tie_weights_changes_nothing(self, model: Any, ids: Tensor) -> None:
        expected = model(ids).logits
        model.tie_weights()
        assert torch.equal(model(ids).logits, expected)
        assert model.get_input_embeddings().matrix is model.get_output_embeddings().matrix

    def test_init_weights_leaves_factors_alone(self, model: Any, ids: Tensor) -> None:
        expected = model(ids).logits
        for module in model.modules():
            if isinstance(module, FactorizedLinear | FactorizedEmbedding | FactorizedMatrix):
                model._init_weights(module)
        assert torch.equal(model(ids).logits, expected)

    def test_save_pretrained_writes_every_factor_once(self, model: Any, tmp_path: Path) -> None:
        from safetensors import safe_open

        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        marks = sum(len(users) for _, users in factorized_groups(model))  # one number for each dense weight
        assert sum(tensor.numel() for tensor in saved.values()) == num_params(model) + marks

    def test_gradient_checkpointing(self, model: Any, ids: Tensor) -> None:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(ids, labels=ids).loss.backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.23
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_an_untied_head_stays_untied(untied_gpt2: Any) -> None:
    model = untied_gpt2
    tdkit.compress(model, half)
    assert model.transformer.wte.matrix is not model.lm_head.matrix
    model.tie_weights()
    assert model.transformer.wte.matrix is not model.lm_head.matrix


def test_a_head_alone_may_not_leave_a_tied_embedding_behind(gpt2: Any, ids: Tensor) -> None:
    tdkit.compress(gpt2, Policy([Rule("lm_head", LowRank(rank=8))]))
    assert gpt2.lm_head.matrix is gpt2.transformer.wte.matrix
    assert isinstance(gpt2.transformer.wte, FactorizedEmbedding)
    gpt2.tie_weights()
    assert gpt2(ids).logits.shape == (2, 7, 60)


def test_a_policy_s_plan_and_the_policy_give_the_same(tied: Any, ids: Tensor) -> None:
    twin = copy.deepcopy(tied)
    plan: Plan = tdkit.plan(tied, half)
    assert torch.equal(tdkit.compress(tied, plan)(ids), tdkit.compress(twin, half)(ids))


def test_weights_that_wait_on_disk_come_back_when_a_fit_fails(monkeypatch: pytest.MonkeyPatch, tied: Any) -> None:
    monkeypatch.setattr("tdkit.models.swap.SPILL_FROM", 0)
    before = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    modules = dict(tied.named_modules())
    fits.clear()
    with pytest.raises(KeyboardInterrupt):
        tdkit.compress(tied, Policy([Rule("*", Failing(rank=2, what=KeyboardInterrupt))]))
    assert len(fits) == 3
    assert dict(tied.named_modules()) == modules
    for name, tensor in tied.state_dict().items():
        assert torch.equal(tensor, before[name])


@by_name
def test_spilling_weights_to_disk_changes_no_factor(
    kind: Decomposition, monkeypatch: pytest.MonkeyPatch, gpt2: Any
) -> None:
    policy, twin = Policy([Rule("*", kind)], budget=0.6), copy.deepcopy(gpt2)
    tdkit.compress(twin, policy)
    weights = [TensorWeakRef(parameter) for parameter in gpt2.parameters() if parameter.ndim == 2]
    monkeypatch.setattr("tdkit.models.swap.SPILL_FROM", 0)
    rewritten = tdkit.plan(gpt2, policy).rewritten
    tdkit.compress(gpt2, policy)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, gpt2.state_dict()[name])
    assert sum(weight() is None for weight in weights) == len(rewritten)


def test_a_spilled_weight_or_layer_that_somebody_else_holds_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tied: Any
) -> None:
    monkeypatch.setattr("tdkit.models.swap.SPILL_FROM", 0)
    outside, up = nn.Linear(24, 40, bias=False), tied.up
    outside.weight = tied.embed.weight
    before = {"shared": outside.weight.clone(), "up": up.weight.clone()}
    tdkit.compress(tied, half)
    assert torch.equal(outside.weight, before["shared"])
    assert torch.equal(up.weight, before["up"])


@pytest.mark.parametrize("held", [True, False], ids=["held by others", "held by nobody"])
def test_undoing_restores_the_layout_of_spilled_weights_and_their_ties(
    monkeypatch: pytest.MonkeyPatch, tied: Any, held: bool
) -> None:
    monkeypatch.setattr("tdkit.models.swap.SPILL_FROM", 0)
    tied.down.weight = nn.Parameter(tied.down.weight.detach().T.contiguous().T, requires_grad=False)
    parameters = dict(tied.named_parameters()) if held else {}
    before = {name: (p.clone(), p.stride(), p.requires_grad) for name, p in tied.named_parameters()}
    fits.clear()
    with pytest.raises(OptionError, match=r"the decomposition low_rank .* failed: RuntimeError"):
        tdkit.compress(tied, Policy([Rule("*", Failing(rank=2, what=RuntimeError))]))
    for name, parameter in tied.named_parameters():
        value, stride, gradient = before[name]
        assert torch.equal(parameter, value)
        assert (parameter.stride(), parameter.requires_grad) == (stride, gradient)
        assert not held or parameter is parameters[name]
    assert tied.head.weight is tied.embed.weight


def test_a_full_disk_keeps_the_weights_in_memory(
    monkeypatch: pytest.MonkeyPatch, tied: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tdkit.models.swap.SPILL_FROM", 0)
    monkeypatch.setattr("tdkit.models.swap.Aside.put", full)
    tdkit.compress(tied, half)
    assert tdkit.applied_plan(tied).rewritten
    assert "stay in memory" in caplog.text


def test_a_weight_leaves_the_memory_before_the_next_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    depth, alive, seen = 6, [], []
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(depth)))
    for layer in model:
        storage = layer.weight.untyped_storage()
        alive.append(storage.data_ptr())
        weakref.finalize(storage, alive.remove, storage.data_ptr())
    del storage, layer

    @dataclass(frozen=True, kw_only=True)
    class Watching(LowRank):
        def fit(self, weight: Tensor, metric: Metric | None = None) -> LowRankMatrix:
            seen.append(len(alive))
            return super().fit(weight, metric)

    monkeypatch.setattr("tdkit.models.swap.SPILL_FROM", 0)
    tdkit.compress(model, Policy([Rule("*", Watching(rank=4))]), progress=False)
    assert seen == [depth - fitted for fitted in range(depth)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Rule("*", LowRank(rank=2)), r"a Rule is no policy: put it into one: Policy\(\[rule\]"),
        ({"rules": []}, r"a dict is no policy: read it with Policy\.from_dict"),
        ("rules: []", r"a str is no policy: read it with Policy\.from_yaml"),
        ([Rule("*", LowRank(rank=2))], r"a list is no policy: put the rules into one"),
        (None, r"a NoneType is no policy: build a tdkit\.Policy or a tdkit\.Plan"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_policy_is_told(given: Any, said: str, tied: Any) -> None:
    with pytest.raises(PolicyError, match=said):
        tdkit.compress(tied, given)
    with pytest.raises(PolicyError, match=said):
        tdkit.plan(tied, given)
    with pytest.raises(PolicyError, match=r"the model is a str, not a torch\.nn\.Module"):
        tdkit.compress("gpt2", half)  # type: ignore[arg-type]


def test_a_model_on_meta_is_planned_but_not_compressed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert len(tdkit.plan(model, half).rewritten) == 2
    before = list(model)
    with pytest.raises(PolicyError, match="the weights of 0, 1 are on the meta device and hold no numbers: load the"):
        tdkit.compress(model, half)
    assert list(model) == before


def test_layers_are_called_as_before() -> None:
    from transformers.pytorch_utils import Conv1D

    x, ids = torch.randn(2, 12), torch.tensor([1, 3])
    model = nn.ModuleDict({"linear": nn.Linear(12, 18), "conv": Conv1D(18, 12), "embed": nn.Embedding(20, 12)})
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]))
    assert torch.equal(model["linear"](input=x), model["linear"](x))
    assert torch.equal(model["conv"](x=x), model["conv"](x))
    assert torch.equal(model["embed"](input=ids), model["embed"](ids))


def test_an_open_rank_without_a_budget_says_where_to_give_one(tied: Any) -> None:
    with pytest.raises(OptionError) as told:
        tdkit.plan(tied, Policy([Rule("*", LowRank())]))
    assert len(str(told.value).splitlines()) == 1
    assert "embed, up, down: low_rank() leaves its rank open" in str(told.value)
    assert "give Policy(budget=...), Rule(budget=...) or the option" in str(told.value)


@pytest.mark.parametrize(
    "where", ["tdkit.models.swap.follow_ties", "tdkit.models.ties.follow_vocabulary", "tdkit.compression.apply.attach"]
)
def test_ctrl_c_at_the_end_leaves_the_ties_of_the_dense_model(
    where: str, gpt2: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, ties, known = gpt2(ids).logits, dict(gpt2.all_tied_weights_keys), set(vars(gpt2))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            tdkit.compress(gpt2, Policy([Rule("*", LowRank())], budget={"bytes": 0.4, "dtype": "float16"}))
    assert gpt2.all_tied_weights_keys == ties
    assert set(vars(gpt2)) == known
    gpt2.tie_weights()
    assert torch.equal(gpt2(ids).logits, before)


def test_weights_set_aside_have_no_file_that_could_vanish(
    tied: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdkit.models.swap.SPILL_FROM", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    fits.clear()
    with pytest.raises(KeyboardInterrupt):
        tdkit.compress(tied, Policy([Rule("*", Failing(rank=2, what=KeyboardInterrupt))]))
    assert len(fits) == 3
    assert not list(tmp_path.iterdir())
    for name, tensor in tied.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_weight_that_cannot_be_read_back_is_told_once_all_others_are(
    tied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdkit.models.swap.SPILL_FROM", 0)
    get, calls = Aside.get, []

    def failing(self: Aside, place: Any) -> Tensor:
        calls.append(place)
        if len(calls) == 1:
            raise OSError("the disk is gone")
        return get(self, place)

    monkeypatch.setattr("tdkit.models.swap.Aside.get", failing)
    fits.clear()
    with pytest.raises(CheckpointError, match=r"1 weights .* cannot be read back \(the disk is gone\)"):
        tdkit.compress(tied, Policy([Rule("*", Failing(rank=2, what=RuntimeError))]))
    assert not any(isinstance(module, FactorizedLinear) for module in tied.modules())


def test_a_fit_that_fails_or_is_no_fit_is_named(tied: Any) -> None:
    class Wrong(LowRank):
        def fit(self, weight: Tensor, metric: Metric | None = None) -> LowRankMatrix:
            weight.zero_()
            return super().fit(weight[:-1], metric)

    before = tied.up.weight.clone()
    with pytest.raises(OptionError, match=r"up: the decomposition low_rank .* of 47x24 for a weight of 48x24"):
        tdkit.compress(tied, Policy([Rule("up", Wrong(rank=2))]))
    assert torch.equal(tied.up.weight, before)
