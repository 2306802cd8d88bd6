"""Groups shrink: planned with the other weights, carried out whole, in plain layers that other code knows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import Auto, Calibration, LowRank, Plan, Policy, Rule, Shrink
from tdkit.errors import CalibrationError, CheckpointError, OptionError, PolicyError
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.models.sites import num_params
from tests.conftest import make_gpt2, make_llama

JOINT = Policy([Rule("*.mlp.*", Shrink()), Rule("*.self_attn.*", LowRank())], budget=0.7)
ONLY = Policy([Rule("*.mlp.*", Shrink())], budget=0.7)


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randint(3, 60, (2, 16)) for _ in range(count)]


@pytest.fixture
def llama() -> Any:
    return make_llama(intermediate_size=64, vocab_size=60, tie_word_embeddings=True)


@pytest.fixture
def calibration(llama: Any) -> Calibration:
    return tdkit.calibrate(llama, batches(), progress=False)


@pytest.mark.parametrize("options", [{}, {"sequential": True}, {"passes": 2}, {"passes": 2, "sequential": True}])
def test_groups_and_single_weights_share_a_budget(
    llama: Any, calibration: Calibration, options: dict[str, Any]
) -> None:
    plan = tdkit.plan(llama, JOINT, calibration=calibration)
    assert plan.params_after <= 0.7 * num_params(llama)
    assert {step.decomposition.name for step in plan.rewritten if step.decomposition} == {"shrink", "low_rank"}
    tdkit.compress(llama, JOINT, calibration=calibration, progress=False, **options)
    assert num_params(llama) <= plan.params_before * 0.7
    mlp = llama.model.layers[0].mlp
    assert type(mlp.gate_proj) is type(mlp.down_proj) is nn.Linear
    assert mlp.gate_proj.out_features == mlp.up_proj.weight.shape[0] == mlp.down_proj.in_features < 64
    assert isinstance(llama.model.layers[0].self_attn.q_proj, FactorizedLinear)
    assert torch.isfinite(llama(batches()[0]).logits).all()


def test_the_plan_has_the_sizes_and_the_loss_of_what_is_made(llama: Any, calibration: Calibration) -> None:
    plan = tdkit.plan(llama, ONLY, calibration=calibration)
    assert Plan.from_json(plan.to_json()).steps == plan.steps
    losses = {step.name: step.loss for step in plan.rewritten}
    assert all((loss is not None and loss > 0) == name.endswith("down_proj") for name, loss in losses.items())
    tdkit.compress(llama, plan, calibration=calibration)
    assert num_params(llama) == plan.params_after
    for step in plan.rewritten:
        assert llama.get_submodule(step.name).weight.numel() == step.params_after


def test_the_estimate_is_the_error_of_the_refit(llama: Any, calibration: Calibration) -> None:
    dense = copy.deepcopy(llama)
    plan = tdkit.plan(llama, ONLY, calibration=calibration)
    tdkit.compress(llama, plan, calibration=calibration)
    for step in plan.rewritten:
        if step.name.endswith("down_proj"):
            assert isinstance(step.decomposition, Shrink)
            group_rows = llama.get_submodule(step.name.replace("down", "gate")).weight
            every = dense.get_submodule(step.name.replace("down", "gate")).weight
            kept = [int((every == row).all(1).nonzero()[0, 0]) for row in group_rows]
            assert kept == sorted(kept)
            gap = dense.get_submodule(step.name).weight.detach().clone()
            gap[:, kept] -= llama.get_submodule(step.name).weight
            metric = calibration.fit_metric(step.name)
            assert metric is not None
            assert step.loss == pytest.approx(metric.squared_error(gap) / 2, rel=1e-3)


def test_with_few_units_gone_it_is_near_the_dense_model_and_far_nearer_than_without_refit(llama: Any) -> None:
    data = batches(32)
    dense, ids = copy.deepcopy(llama), batches(1)[0]
    tdkit.compress(llama, Policy([Rule("*.mlp.*", Shrink(units=48))]), calibration=data, progress=False)
    cut = copy.deepcopy(dense)
    for layer, small in zip(cut.model.layers, llama.model.layers, strict=True):
        rows = small.mlp.gate_proj.weight
        gone = [i for i, row in enumerate(layer.mlp.gate_proj.weight) if not bool((rows == row).all(1).any())]
        layer.mlp.down_proj.weight.data[:, gone] = 0
    expected = dense(ids).logits
    error = (llama(ids).logits - expected).norm()
    assert error < 0.9 * (cut(ids).logits - expected).norm()


def test_a_uniform_width_goes_into_the_config_and_the_folder_is_an_ordinary_one(
    llama: Any, calibration: Calibration, tmp_path: Path
) -> None:
    policy = Policy([Rule("*.mlp.*", Shrink(uniform=True))], budget=0.7)
    tdkit.compress(llama, policy, calibration=calibration)
    width = llama.config.intermediate_size
    assert width == llama.model.layers[1].mlp.intermediate_size == llama.model.layers[1].mlp.up_proj.out_features < 64
    llama.save_pretrained(tmp_path)
    again = type(llama).from_pretrained(tmp_path)
    ids = batches()[0]
    assert torch.equal(again(ids).logits, llama(ids).logits)


def test_different_widths_leave_the_config_alone(llama: Any, calibration: Calibration) -> None:
    first = Rule("model.layers.0.mlp.*", Shrink(units=24))
    tdkit.compress(llama, Policy([first, Rule("*.mlp.*", Shrink(units=40))]), calibration=calibration)
    assert [layer.mlp.up_proj.out_features for layer in llama.model.layers] == [24, 40]
    assert llama.config.intermediate_size == 64


@pytest.mark.parametrize("what", [ValueError, KeyboardInterrupt])
def test_all_or_nothing(
    llama: Any, calibration: Calibration, what: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdkit.compression import jobs

    before = {name: (id(p), p.clone()) for name, p in llama.named_parameters()}
    calls: list[object] = []

    def failing(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise what("in the middle")
        return shrunk(*given)

    shrunk = jobs.shrunk
    monkeypatch.setattr(jobs, "shrunk", failing)
    with pytest.raises(what):
        tdkit.compress(llama, ONLY, calibration=calibration)
    assert len(calls) == 2
    after = dict(llama.named_parameters())
    assert all(id(after[name]) == place and torch.equal(after[name], p) for name, (place, p) in before.items())


def test_hooks_modes_and_frozen_weights_stay(llama: Any, calibration: Calibration) -> None:
    seen: list[torch.Size] = []
    down = llama.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    down.weight.requires_grad_(False)
    llama.train()
    tdkit.compress(llama, ONLY, calibration=calibration)
    new = llama.model.layers[0].mlp.down_proj
    assert new is not down
    assert new.training
    assert not new.weight.requires_grad
    assert llama.model.layers[0].mlp.up_proj.weight.requires_grad
    llama(batches()[0])
    assert [shape[-1] for shape in seen][-1] == new.in_features
    count = len(seen)
    handle.remove()
    llama(batches()[0])
    assert len(seen) == count


def test_biases_shrink_along_and_stay_with_the_consumer() -> None:
    model = make_gpt2()
    dense = copy.deepcopy(model)
    tdkit.compress(model, Policy([Rule("*.mlp.*", Shrink(units=64))]), calibration=batches(), progress=False)
    old, new = dense.transformer.h[0].mlp, model.transformer.h[0].mlp
    assert (new.c_fc.nf, new.c_fc.bias.shape, new.c_proj.nx) == (64, (64,), 64)
    assert set(new.c_fc.bias.tolist()) <= set(old.c_fc.bias.tolist())
    assert torch.equal(new.c_proj.bias, old.c_proj.bias)


def test_tempering_moves_widths_towards_their_mean_within_the_budget(llama: Any) -> None:
    llama.model.layers[0].mlp.down_proj.weight.data *= 5
    known = tdkit.calibrate(llama, batches(), progress=False)

    def widths(temper: float, **options: Any) -> list[int]:
        policy = Policy([Rule("*.mlp.*", Shrink(temper=temper, multiple=1), budget=0.6, **options)])
        plan = tdkit.plan(llama, policy, calibration=known)
        return [step.params_after // 32 for step in plan if step.name.endswith("down_proj")]

    free, half, equal = (widths(share) for share in (0, 0.5, 1))
    assert free[0] > half[0] > equal[0] == equal[1] > half[1] > free[1]
    assert sum(free) == sum(half) == sum(equal) == int(0.6 * 128)
    assert half[0] == pytest.approx((free[0] + equal[0]) / 2, abs=1)
    assert widths(1, min_keep=0.5, max_keep=0.62) == equal


def test_auto_shrinks_groups_and_factorises_the_rest(llama: Any, calibration: Calibration) -> None:
    policy = Policy([Rule("model.layers.*", Auto(among=["shrink", "low_rank"]), budget=0.6)])
    plan = tdkit.plan(llama, policy, calibration=calibration)
    kinds = {step.name.rpartition(".")[2]: step.decomposition for step in plan.rewritten}
    assert isinstance(kinds["up_proj"], Shrink)
    assert isinstance(kinds["q_proj"], LowRank)


def test_auto_factorises_what_cannot_be_tested(llama: Any) -> None:
    policy = Policy([Rule("model.layers.*", Auto(among=["shrink", "low_rank"]), budget=0.6)])
    plan = tdkit.plan(llama, policy)
    assert {step.decomposition.name for step in plan.rewritten if step.decomposition} == {"low_rank"}


def test_shrinking_needs_a_calibration_with_batches(llama: Any, calibration: Calibration) -> None:
    without = Calibration({name: calibration.metric(name) for name in calibration.names})  # type: ignore[arg-type]
    for given in (None, without):
        with pytest.raises(CalibrationError, match="give calibration= with its batches"):
            tdkit.plan(llama, ONLY, calibration=given)


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(x).softmax(-1))
        return y


def test_what_fails_the_test_is_kept_and_the_plan_says_why() -> None:
    model, data = nn.Sequential(Softmax(), Softmax()), [(torch.randn(9, 8), torch.randn(9, 8)) for _ in range(3)]
    calibration = tdkit.calibrate(model, data, progress=False)
    with pytest.raises(OptionError, match="no factors"):
        Shrink(units=4).fit(torch.randn(4, 4))
    plan = tdkit.plan(model, Policy([Rule("*", Shrink(units=8))]), calibration=calibration)
    assert plan.rewritten == ()
    assert {step.reason.partition(":")[0] for step in plan} == {"not shrunk"}
    assert "mixes units" in plan["0.fc1"].reason
    both = Policy([Rule("*", Auto(among=["shrink", "low_rank"]), budget=0.6)])
    alone = tdkit.plan(model, both, calibration=calibration).rewritten
    assert {type(step.decomposition) for step in alone} == {LowRank}


def test_a_rule_that_matches_a_part_of_a_group_says_so(llama: Any, calibration: Calibration) -> None:
    plan = tdkit.plan(llama, Policy([Rule("*.down_proj", Shrink(units=8))]), calibration=calibration)
    assert (
        "shares no hidden units with other weights that the same rule matches"
        in plan["model.layers.0.mlp.down_proj"].reason
    )
    with pytest.raises(OptionError, match=r"model.layers.0.mlp.down_proj: it shares no hidden units"):
        tdkit.plan(llama, Policy([Rule("model.layers.0.mlp.down_proj", Shrink(units=8))]), calibration=calibration)
    with pytest.raises(OptionError, match="units=65 is more than the 64 units"):
        tdkit.plan(llama, Policy([Rule("*.mlp.*", Shrink(units=65))]), calibration=calibration)


def test_a_plan_that_tears_a_group_apart_is_refused(llama: Any, calibration: Calibration) -> None:
    plan = tdkit.plan(llama, Policy([Rule("*.mlp.*", Shrink(units=24))]), calibration=calibration)
    form = plan.to_dict()
    first = next(step for step in form["steps"] if step["decomposition"])
    first["decomposition"] = {"shrink": {"units": 32}}
    with pytest.raises(PolicyError, match="must keep the same number of the 64 units"):
        tdkit.compress(llama, Plan.from_dict(form), calibration=calibration)
    last = next(step for step in form["steps"] if step["names"][0].endswith("0.mlp.down_proj"))
    first["decomposition"], last["decomposition"] = last["decomposition"], None
    with pytest.raises(PolicyError, match="without all the weights that share their hidden units"):
        tdkit.compress(llama, Plan.from_dict(form), calibration=calibration)
    first["decomposition"], last["decomposition"] = last["decomposition"], first["decomposition"]
    with pytest.raises(
        PolicyError, match=r"cannot be carried out: model.layers.0.mlp.down_proj: the model does not run"
    ):
        tdkit.compress(llama, Plan.from_dict(form), calibration=calibration)


def test_names_in_a_rule_make_a_group() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    data = [(torch.randn(9, 8), torch.randn(9, 8)) for _ in range(4)]
    tdkit.compress(model, Policy([Rule("*", Shrink(units=8, shared=("0", "2")))]), calibration=data, progress=False)
    assert [tuple(p.shape) for p in model.parameters()] == [(8, 8), (8,), (8, 8), (8,)]


def test_leverage_scores_choose_other_units(llama: Any, calibration: Calibration) -> None:
    other = copy.deepcopy(llama)
    tdkit.compress(llama, Policy([Rule("*.mlp.*", Shrink(units=24))]), calibration=calibration)
    tdkit.compress(other, Policy([Rule("*.mlp.*", Shrink(units=24, by="leverage"))]), calibration=calibration)
    assert not torch.equal(llama.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)
    assert num_params(llama) == num_params(other)


def test_policies_are_written_and_read() -> None:
    policy = Policy([Rule("*.mlp.*", Shrink(uniform=True, by="leverage", shared=("a", "b")))], budget=0.5)
    assert Policy.from_yaml(policy.to_yaml()) == policy
    assert Policy.from_yaml("rules: [{match: '*', with: shrink}]\nbudget: 0.5").rules[0].decomposition == Shrink()
    for wrong, message in (
        ({"units": 0}, "units=0 must be an integer of at least 1"),
        ({"uniform": "yes"}, "uniform='yes' must be true or false"),
        ({"temper": 1.5}, "temper=1.5 must be a number from 0 to 1"),
        ({"by": "size"}, "by='size' must be one of loss, leverage"),
        ({"shared": ("a",)}, "must be the names of two or more weights"),
    ):
        with pytest.raises(OptionError, match=message):
            Shrink(**wrong)


@pytest.mark.parametrize("policy", [JOINT, ONLY, Policy([Rule("model.layers.*", Shrink(multiple=1))], budget=0.7)])
def test_a_saved_model_is_read_as_it_was(llama: Any, calibration: Calibration, tmp_path: Path, policy: Policy) -> None:
    from transformers import AutoModelForCausalLM

    tdkit.compress(llama, policy, calibration=calibration)
    folder, ids = tmp_path / "smaller", batches()[0]
    tdkit.save(llama, folder)
    expected = llama(ids).logits
    for again in (
        tdkit.load(folder),
        tdkit.load(folder, model=make_llama(intermediate_size=64, vocab_size=60, tie_word_embeddings=True)),
        AutoModelForCausalLM.from_pretrained(folder),
    ):
        assert torch.equal(again(ids).logits, expected)
        plans = [tdkit.applied_plan(model) for model in (again, llama)]
        assert plans[0] == plans[1]
        assert plans[0].params_after == num_params(again) == num_params(llama)
        assert plans[0].params_before == num_params(make_llama(intermediate_size=64, vocab_size=60))
        tdkit.save(again, folder, overwrite=True)


def test_save_pretrained_writes_the_same_folder(llama: Any, calibration: Calibration, tmp_path: Path) -> None:
    tdkit.compress(llama, ONLY, calibration=calibration)
    llama.save_pretrained(tmp_path / "theirs")
    ids = batches()[0]
    assert torch.equal(tdkit.load(tmp_path / "theirs")(ids).logits, llama(ids).logits)
    tdkit.save(llama, tmp_path / "ours")
    names = [sorted(file.name for file in (tmp_path / whose).iterdir()) for whose in ("ours", "theirs")]
    assert names[0] == names[1]


def test_any_model_with_smaller_layers_is_saved_and_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    model = build()
    data = [(torch.randn(9, 8), torch.randn(9, 8)) for _ in range(4)]
    tdkit.compress(model, Policy([Rule("*", Shrink(units=8, shared=("0", "2")))]), calibration=data, progress=False)
    tdkit.save(model, tmp_path / "smaller")
    again, x = tdkit.load(tmp_path / "smaller", model=build()), torch.randn(3, 8)
    assert torch.equal(again(x), model(x))
    with pytest.raises(CheckpointError, match="layer 0 is a Conv1d in this model, whose size is not changed"):
        tdkit.load(tmp_path / "smaller", model=nn.Sequential(nn.Conv1d(8, 16, 1)))
    step = tdkit.applied_plan(model)["0"]
    assert (step.shape, step.decomposition, step.params_before, step.params_after) == (
        (16, 8),
        Shrink(units=8),
        144,
        72,
    )


def test_damaged_sizes_are_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    tdkit.save(model, tmp_path / "whole")
    file = tmp_path / "whole" / "tdkit.json"
    for sizes, message in (([], "'sizes' is malformed"), ({"0": [8]}, r"layer 0 has no size \[8\]")):
        file.write_text(json.dumps({**json.loads(file.read_text()), "sizes": sizes}))
        with pytest.raises(CheckpointError, match=message):
            tdkit.load(tmp_path / "whole", model=model)


def test_without_gradients_all_groups_keep_the_same_share(llama: Any) -> None:
    known = tdkit.calibrate(llama, batches(), gradients=False, progress=False)
    plan = tdkit.plan(llama, Policy([Rule("*.mlp.*", Shrink(), budget=0.5)]), calibration=known)
    assert {step.decomposition for step in plan.rewritten} == {Shrink(units=32)}
    assert all(step.loss is None for step in plan)
    tdkit.compress(llama, plan, calibration=known)
    assert num_params(llama) == plan.params_after


def test_attention_with_biases_is_kept_and_the_plan_says_why() -> None:
    model = make_llama(attention_bias=True)
    plan = tdkit.plan(model, Policy([Rule("*self_attn*", Shrink(units=4))]), calibration=batches())
    assert plan["model.layers.0.self_attn.v_proj"].reason == (
        "not shrunk: model.layers.0.self_attn.v_proj has a bias, which would have to lose rows too"
    )


@pytest.mark.parametrize(
    ("units", "step"), [(7, 8), (100, 8), (255, 8), (256, 16), (1000, 32), (1024, 64), (14336, 64)]
)
def test_numbers_of_units_are_multiples_that_products_are_fast_with(units: int, step: int) -> None:
    shape = (units, 3)
    assert Shrink().step(units) == step
    assert [each.units for each in Shrink().candidates(shape)] == list(range(step, units + 1, step))
    fitted = Shrink().complete(shape, 3 * units - 1)
    assert fitted == (Shrink(units=(units - 1) // 8 * 8) if units > 8 else None), "of equal shares"
    assert Shrink(multiple=5).step(units) == 5
    assert Shrink(uniform=True).step(units) == 8, "one step is one of all layers"


@pytest.mark.parametrize(("allocation", "step"), [("uniform", 8), ("loss", 64)])
def test_equal_shares_are_finer_than_those_that_the_loss_chooses(allocation: str, step: int) -> None:
    model = make_llama(intermediate_size=1024, num_hidden_layers=2)
    policy = Policy([Rule("*.mlp.*", Shrink(), budget=0.7)], allocation=allocation)
    plan = tdkit.plan(model, policy, calibration=batches())
    units = [each.decomposition.units for each in plan.rewritten if isinstance(each.decomposition, Shrink)]
    assert units
    assert all(count % step == 0 for count in units)
    if allocation == "uniform":
        assert set(units) == {712}, "the largest multiple of 8 within the budget"
