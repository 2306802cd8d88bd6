"""Calibrated compression of whole models, all layers at once and block after block."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import Auto, Calibration, Kronecker, LowRank, Metric, Policy, Rule, TTMatrix
from tdkit.calibration.chains import blocks_of, trace
from tdkit.calibration.measure import measured
from tdkit.calibration.runner import Runner
from tdkit.errors import CalibrationError, OptionError, PolicyError
from tdkit.models.sites import Site, replace_module, survey
from tests.conftest import make_gpt2, make_llama


def text(count: int = 4, length: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(60, (2, length), generator=generator) for _ in range(count)]


def blocks_policy(model: nn.Module, budget: float = 0.6, **options: Any) -> Policy:
    match = "transformer.h.*" if hasattr(model, "transformer") else "model.layers.*"
    return Policy([Rule(match, LowRank(), budget=budget)], **options)


def kl(model: nn.Module, reference: list[Tensor], batches: list[Tensor]) -> float:
    with torch.no_grad():
        total = sum(
            torch.nn.functional.kl_div(
                model(ids).logits.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum"
            )
            for ids, logits in zip(batches, reference, strict=True)
        )
    return float(total)


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_calibrated_fits_change_the_model_less(make: Any) -> None:
    batches = text(16)
    models = {name: make() for name in ("plain", "two-sided", "sequential", "passes")}
    for parameter in models["plain"].parameters():  # a random model says little: let the blocks speak up
        parameter.data.mul_(4.0 if parameter.ndim == 2 else 1.0)
    for model in models.values():
        model.load_state_dict(models["plain"].state_dict())
    with torch.no_grad():
        reference = [models["plain"](ids).logits for ids in batches]
    calibration = tdkit.calibrate(models["plain"], batches)
    tdkit.compress(models["plain"], blocks_policy(models["plain"]))
    tdkit.compress(models["two-sided"], blocks_policy(models["two-sided"]), calibration=calibration)
    tdkit.compress(models["sequential"], blocks_policy(models["sequential"]), calibration=calibration, sequential=True)
    tdkit.compress(models["passes"], blocks_policy(models["passes"]), calibration=calibration, passes=2)
    costs = {name: kl(model, reference, batches) for name, model in models.items()}
    assert costs["two-sided"] < costs["plain"]
    assert costs["sequential"] < costs["plain"]
    assert costs["passes"] < costs["plain"]


def test_the_budget_goes_where_the_loss_is(llama: Any) -> None:
    batches = text()
    calibration = tdkit.calibrate(llama, batches)
    for budget in (0.5, 0.7, 0.9):
        plan = tdkit.plan(llama, blocks_policy(llama, budget), calibration=calibration)
        block_sites = [s for s in plan if s.name.startswith("model.layers")]
        before, after = sum(s.params_before for s in block_sites), sum(s.params_after for s in block_sites)
        assert budget - 0.01 < after / before <= budget
        uniform = tdkit.plan(llama, blocks_policy(llama, budget, allocation="uniform"), calibration=calibration)
        assert all(step.loss is None for step in uniform)
        assert len({s.params_after / s.params_before for s in block_sites}) > 3
        assert all(step.loss is not None and step.loss > 0 for step in plan.rewritten)
        assert promised(plan) == pytest.approx(estimated(llama, plan, calibration), rel=0.01)
        assert promised(plan) <= estimated(llama, uniform, calibration) + 1e-9


def promised(plan: tdkit.Plan) -> float:
    """What a plan says that it costs."""
    return sum(step.loss for step in plan if step.loss is not None)


def estimated(model: nn.Module, plan: tdkit.Plan, calibration: Calibration) -> float:
    """What the calibration says a plan costs."""
    weights = {site.name: site.weight for site in survey(model).sites}
    total = 0.0
    for step in plan.rewritten:
        metric = calibration.fit_metric(step.name)
        assert metric is not None
        assert step.decomposition is not None
        fit = step.decomposition.fit(weights[step.name], metric).dense()
        total += metric.squared_error((weights[step.name] - fit).double()) / 2
    return total


def test_curves_are_kept_for_the_next_budget_but_not_for_other_weights(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = tdkit.calibrate(llama, text())
    first = tdkit.plan(llama, blocks_policy(llama, 0.6), calibration=calibration)
    computed: list[Tensor] = []
    curve = LowRank.curve
    monkeypatch.setattr(LowRank, "curve", lambda self, w, m=None: computed.append(w) or curve(self, w, m))
    assert tdkit.plan(llama, blocks_policy(llama, 0.6), calibration=calibration) == first
    tdkit.plan(llama, blocks_policy(llama, 0.8), calibration=calibration)
    assert not computed
    with torch.no_grad():
        llama.model.layers[0].self_attn.q_proj.weight.mul_(2)
    tdkit.plan(llama, blocks_policy(llama, 0.6), calibration=calibration)
    assert len(computed) == 1


def test_bounds_of_a_rule(llama: Any) -> None:
    rule = Rule("model.layers.*", LowRank(), budget=0.6, min_keep=0.4, max_keep=0.8)
    assert Rule.from_dict(rule.to_dict()) == rule
    policy = Policy([rule], allocation="loss")
    assert Policy.from_yaml(policy.to_yaml()) == policy
    for calibration in (None, tdkit.calibrate(llama, text())):
        if calibration is None:
            policy = Policy([rule])
        for step in tdkit.plan(llama, policy, calibration=calibration).rewritten:
            least = (
                0.4 if calibration else 0.4 - sum(step.shape) / step.params_before
            )  # a uniform share is rounded down
            assert least <= step.params_after / step.params_before <= 0.8


def test_loss_allocation_needs_gradients(llama: Any) -> None:
    with pytest.raises(PolicyError, match="calibration with gradients"):
        tdkit.plan(llama, blocks_policy(llama, allocation="loss"))
    one_sided = tdkit.calibrate(llama, text(), gradients=False)
    with pytest.raises(PolicyError, match="calibration with gradients"):
        tdkit.plan(llama, blocks_policy(llama, allocation="loss"), calibration=one_sided)
    assert tdkit.plan(llama, blocks_policy(llama), calibration=one_sided).rewritten[0].loss is None


def test_auto_takes_what_suits_each_layer(llama: Any) -> None:
    calibration = tdkit.calibrate(llama, text())
    single = {}
    for kind in (LowRank(), Kronecker(), TTMatrix()):
        plan = tdkit.plan(llama, Policy([Rule("model.layers.*", kind, budget=0.6)]), calibration=calibration)
        single[kind.name] = promised(plan)
    policy = Policy([Rule("model.layers.*", Auto(among=tuple(single)), budget=0.6)])
    assert Policy.from_yaml(policy.to_yaml()) == policy
    plan = tdkit.plan(llama, policy, calibration=calibration)
    assert 0 < promised(plan) <= min(single.values()) * 1.02
    assert any(step.runner_up for step in plan.rewritten)
    assert "runner-up" in str(plan)
    assert tdkit.Plan.from_json(plan.to_json()) == plan
    tdkit.compress(llama, plan, calibration=calibration)
    assert llama(text()[0]).logits.isfinite().all()


def test_auto_without_calibration_takes_the_least_error(llama: Any) -> None:
    plan = tdkit.plan(llama, Policy([Rule("*.mlp.*", "auto", budget=0.6)]))
    assert len(plan.rewritten) == 6
    weights = {site.name: site.weight.detach() for site in survey(llama).sites}
    for step in plan.rewritten:
        weight = weights[step.name]
        richest = [kind.complete(step.shape, int(0.6 * weight.numel())) for kind in (LowRank(), Kronecker())]
        errors = {kind: kind.error(weight, kind.fit(weight)) for kind in richest if kind is not None}
        assert step.decomposition == min(errors, key=lambda kind: errors[kind])


def test_the_same_calibration_gives_the_same_plan_and_factors() -> None:
    torch.manual_seed(0)
    state = make_llama().state_dict()
    results = []
    for _ in range(2):
        model = make_llama()
        model.load_state_dict(state)
        tdkit.compress(model, blocks_policy(model), calibration=text(), sequential=True)
        results.append((tdkit.applied_plan(model).to_json(), {k: v.clone() for k, v in model.state_dict().items()}))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())


def test_the_first_block_is_fitted_on_the_dense_inputs(llama: Any) -> None:
    """In sequential order the first block's inputs are the dense model's, so its factors are the same."""
    batches = text()
    calibration = tdkit.calibrate(llama, batches)
    policy = Policy([Rule("model.layers.*.q_proj", LowRank(rank=5))])
    once = make_llama()
    once.load_state_dict(llama.state_dict())
    tdkit.compress(once, policy, calibration=calibration)
    tdkit.compress(llama, policy, calibration=calibration, sequential=True)
    first, second = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    torch.testing.assert_close(llama.get_submodule(first).weight, once.get_submodule(first).weight)
    assert not torch.allclose(llama.get_submodule(second).weight, once.get_submodule(second).weight)


def test_the_chain_of_blocks(llama: Any) -> None:
    batches = text()
    (blocks,) = blocks_of(llama, survey(llama).sites)
    (names,) = blocks.choices
    assert names == ("model.layers.0", "model.layers.1")
    with torch.no_grad():
        chain = trace(llama, names, batches)
        hidden = chain.hidden
        for name, calls in zip(names, chain.calls, strict=True):
            outputs = [llama.get_submodule(name)(x, *a, **k) for x, (a, k) in zip(hidden, calls, strict=True)]
            hidden = [y[0] if isinstance(y, tuple) else y for y in outputs]
        for ids, x in zip(batches, hidden, strict=True):
            torch.testing.assert_close(llama.lm_head(llama.model.norm(x)), llama(ids).logits)


class Crossed(nn.Module):
    """Blocks that do not follow each other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[1](self.blocks[0](x) + x)
        out: Tensor = self.blocks[2](y)
        return out


def test_sequential_faults_leave_the_model_alone() -> None:
    model = Crossed()
    batches = [torch.randn(5, 6) for _ in range(2)]
    calibration = tdkit.calibrate(model, batches, gradients=False)
    policy = Policy([Rule("*", LowRank(rank=2))])
    before = dict(model.named_modules())
    with pytest.raises(CalibrationError, match=r"blocks\.1 does not take what blocks\.0 returned"):
        tdkit.compress(model, policy, calibration=calibration, sequential=True)
    assert dict(model.named_modules()) == before
    with pytest.raises(CalibrationError, match="runs the calibration batches again"):
        tdkit.compress(model, policy, sequential=True)
    flat = nn.ModuleDict({"a": nn.Linear(6, 6)})
    with pytest.raises(CalibrationError, match=r"this model has none"):
        blocks_of(flat, survey(flat).sites)


def test_an_interrupted_sequential_run_leaves_the_model_as_it_was(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = tdkit.calibrate(llama, text())
    before = dict(llama.named_modules())
    fit = LowRank.fit
    count = 0

    def interrupted(self: LowRank, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 10:
            raise KeyboardInterrupt
        return fit(self, *args, **options)

    monkeypatch.setattr(LowRank, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tdkit.compress(llama, blocks_policy(llama), calibration=calibration, sequential=True)
    assert dict(llama.named_modules()) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
    assert llama.config.use_cache


def test_a_second_pass_fits_the_dense_weights_in_the_mean_of_both_models_moments() -> None:
    batches = text()
    model, by_hand = make_gpt2(), make_gpt2()
    by_hand.load_state_dict(model.state_dict())
    first = tdkit.calibrate(by_hand, batches)
    policy = blocks_policy(model)
    compressed = tdkit.compress(copy.deepcopy(by_hand), policy, calibration=first)
    with torch.no_grad():
        for site in survey(by_hand).sites:  # the same functions as dense layers, so that all can be measured
            layer = compressed.get_submodule(site.name)
            for user in site.users:
                twin = copy.deepcopy(user.module)
                twin.weight.copy_(layer.weight)
                replace_module(compressed, user.name, twin)
    second = tdkit.calibrate(compressed, batches)
    means = {}
    for name in first.names:
        ends = [first.metric(name), second.metric(name)]
        means[name] = Metric(*(sum(getattr(m, side) for m in ends) / 2 for side in ("input", "output")))
    mean = Calibration(means)
    mean.rows, mean.units = first.rows, first.units
    expected = tdkit.compress(by_hand, policy, calibration=mean)
    found = tdkit.compress(model, policy, calibration=first, passes=2)
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in expected.named_parameters()]
    with torch.no_grad():
        torch.testing.assert_close(found(batches[0]).logits, expected(batches[0]).logits, rtol=1e-3, atol=1e-4)


def test_a_pass_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make_gpt2(), text()
    before = model(batches[0]).logits
    calibration = tdkit.calibrate(model, batches)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tdkit.compression.apply.recalibrate", fail)
    with pytest.raises(KeyboardInterrupt):
        tdkit.compress(model, blocks_policy(model), calibration=calibration, passes=2)
    torch.testing.assert_close(model(batches[0]).logits, before)
    with pytest.raises(CalibrationError, match="passes=2"):
        tdkit.compress(model, blocks_policy(model), passes=2)
    with pytest.raises(OptionError, match="passes=0"):
        tdkit.compress(model, blocks_policy(model), passes=0)


def test_batches_are_run_only_for_the_layers_that_a_sound_policy_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_gpt2(), []

    def watched(runner: Runner, sites: list[Site], *args: Any, **options: Any) -> Calibration:
        seen.append(sorted(site.name for site in sites))
        return measured(runner, sites, *args, **options)

    monkeypatch.setattr("tdkit.planning.planner.measured", watched)
    with pytest.raises(OptionError, match="rank=1000"):
        tdkit.compress(model, Policy([Rule("*.mlp.c_fc", LowRank(rank=1000))]), calibration=text())
    assert not seen
    tdkit.compress(model, Policy([Rule("*.mlp.c_fc", LowRank(rank=2))]), calibration=text())
    assert seen == [[name for name, _ in model.named_modules() if name.endswith("mlp.c_fc")]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
def test_the_factors_learn_and_have_the_mode_of_the_model(sequential: bool, training: bool) -> None:
    model, batches = make_gpt2(), text()
    model.train(training)
    model.transformer.h[1].attn.eval()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    tdkit.compress(model, blocks_policy(model), calibration=batches, sequential=sequential)
    rewritten = {step.name for step in tdkit.applied_plan(model).rewritten}
    assert "transformer.h.0.mlp.c_fc" in rewritten
    for name in rewritten:
        layer = model.get_submodule(name)
        learns = name != "transformer.h.0.mlp.c_fc"
        assert all(factor.requires_grad is learns for factor in layer.matrix.parameters())
        assert layer.training is layer.matrix.training is modes[name]
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes


class Moving(nn.Module):
    """Blocks in a row, in a model that notes which parameters move with it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 60)
        self.moves: list[tuple[str, set[int]]] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    def to(self, device: Any) -> Any:  # type: ignore[override]
        self.moves.append((str(device), {id(parameter) for parameter in self.parameters()}))
        return super().to(device)


def test_a_failure_half_way_brings_every_dense_weight_home_with_its_bias() -> None:
    model, batches = Moving(), text()
    calibration = tdkit.calibrate(model, batches)
    with torch.no_grad():
        model.blocks[2].weight.fill_(float("nan"))
    parameters = {id(parameter) for parameter in model.parameters()}
    with pytest.raises(PolicyError, match=r"blocks\.2 holds NaN"):
        tdkit.compress(
            model, Policy([Rule("blocks.*", LowRank(rank=2))]), calibration=calibration, sequential=True, device="cpu"
        )
    assert [device for device, _ in model.moves] == ["cpu", "cpu"]
    assert model.moves[1][1] == parameters  # nothing that was replaced stays where the fits ran


@pytest.mark.gpu
def test_a_failure_half_way_leaves_all_on_the_cpu() -> None:
    model, batches = Moving(), text()
    calibration = tdkit.calibrate(model, batches)
    with torch.no_grad():
        model.blocks[2].weight.fill_(float("nan"))
    with pytest.raises(PolicyError, match=r"blocks\.2 holds NaN"):
        tdkit.compress(
            model, Policy([Rule("blocks.*", LowRank(rank=2))]), calibration=calibration, sequential=True, device="cuda"
        )
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@dataclass
class Output:
    hidden: Tensor


def test_blocks_that_return_something_else_are_told() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(60, 16)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), Wrapping()) for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x).hidden
            return cast(Tensor, x)

    class Wrapping(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x)

    model = Model()
    calibration = tdkit.calibrate(model, text(), gradients=False)
    with pytest.raises(CalibrationError, match="return their hidden states, alone or first in a tuple, not a Output"):
        tdkit.compress(model, Policy([Rule("blocks.*", LowRank(rank=2))]), calibration=calibration, sequential=True)
    assert isinstance(model.blocks[0][0], nn.Linear)


def test_a_model_is_surveyed_and_a_policy_assigned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make_gpt2(), []

    def counted(name: str, work: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return work(*args, **options)

        return call

    for place in ("planning.resolution", "calibration.measure", "planning.planner"):
        monkeypatch.setattr(f"tdkit.{place}.survey", counted("survey", survey))
    monkeypatch.setattr(Policy, "assign", counted("assign", Policy.assign))
    tdkit.compress(model, blocks_policy(model), calibration=text(), passes=3)
    assert calls == ["survey", "assign"]
