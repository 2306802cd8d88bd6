"""Models with experts: every family computes by factors what its own code computes, and is calibrated per expert."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.granitemoe import modeling_granitemoe

import tdkit
from tdkit import Auto, Calibration, Kronecker, LowRank, Policy, Rule, Stacked
from tdkit.decompositions.stacks import FactorizedStack
from tdkit.errors import TdkitError
from tdkit.evaluation.speed import benchmark
from tdkit.models.hosts.experts import ExpertsHost, ExpertsLayer
from tdkit.models.hosts.registered import dense_layer, host_of
from tdkit.models.hosts.routing import Routing, experts_forward
from tdkit.models.sites import factorized_layers, survey

COMMON = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "intermediate_size": 12,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 12, "num_local_experts": 4},
    "Qwen2Moe": {"moe_intermediate_size": 10, "shared_expert_intermediate_size": 12, "num_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 10, "num_experts": 4, "head_dim": 8},
    "DeepseekV3": {
        "moe_intermediate_size": 10,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        **LATENT,
        "first_k_dense_replace": 1,
    },
    "GptOss": {"intermediate_size": 12, "num_local_experts": 4, "head_dim": 8},
    "Olmoe": {"intermediate_size": 12, "num_experts": 4},
    "GraniteMoe": {"intermediate_size": 12, "num_local_experts": 4},
    "NemotronH": {
        **{"layers_block_type": ["moe", "attention"], "head_dim": 8, "mamba_head_dim": 8, "mamba_num_heads": 4},
        **{"moe_intermediate_size": 10, "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 12},
    },
}
EXPERTS = [Rule("*experts*proj", LowRank()), Rule("*", keep=True)]


def model_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    torch.manual_seed(0)
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def ids(rows: int = 3, length: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, batch: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids() if batch is None else batch).logits
    return found


def stacks(model: nn.Module) -> list[str]:
    return [site.name for site in survey(model).sites if site.stacked]


def own_experts(family: str) -> bool:
    """Whether the installed transformers computes the experts of a family by modules of that family only."""
    return family == "GraniteMoe" and hasattr(modeling_granitemoe, "GraniteMoeParallelExperts")


OWN = pytest.mark.skip(
    reason=f"transformers {transformers.__version__} computes the experts of this family its own way"
)
every = pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[OWN] if own_experts(family) else []) for family in FAMILIES]
)


@every
def test_all_weights_are_found_and_full_rank_factors_compute_what_the_model_does(family: str) -> None:
    model = model_of(family)
    found = survey(model)
    assert all("is a vector" in each.reason for each in found.untouchable)
    assert len(stacks(model)) in (2, 4)
    expected = logits(model)
    full = {site.name: LowRank(rank=min(site.shape[1:])) for site in found.sites if site.stacked}
    rules = [Rule(name, kind) for name, kind in full.items()]
    small = tdkit.compress(copy.deepcopy(model), Policy([*rules, Rule("*", keep=True)], allow_growth=True))
    torch.testing.assert_close(logits(small), expected)
    layers = [layer for _, layer in factorized_layers(small)]
    assert layers
    for layer in layers:
        assert isinstance(layer, ExpertsLayer)
        assert all(isinstance(matrix, FactorizedStack) for matrix in layer.matrices.values())
        assert all(ExpertsHost().computed(layer, name) == "by factors" for name in layer.matrices)


@every
def test_the_result_does_not_depend_on_the_experts_implementation(family: str) -> None:
    model: Any = tdkit.compress(model_of(family, torch.float32), Policy(EXPERTS, budget=0.7))
    expected = logits(model)
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert torch.equal(logits(model), expected)


@every
def test_it_is_saved_and_copied_bit_for_bit_and_can_be_trained(family: str, tmp_path: Path) -> None:
    model = tdkit.compress(model_of(family), Policy([Rule("*", LowRank())], budget=0.6))
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    tdkit.save(model, tmp_path / "small")
    assert torch.equal(logits(tdkit.load(tmp_path / "small", model=model_of(family))), expected)
    model.train()
    model(ids(), labels=ids()).loss.backward()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("kind", [Kronecker(), Stacked(shared=True), Auto()], ids=lambda kind: kind.name)
def test_every_kind_of_stack_computes_what_its_dense_weights_do(family: str, kind: Any) -> None:
    model = tdkit.compress(model_of(family), Policy([Rule("*experts*proj", kind)], budget=0.7))
    expected = logits(model)
    tdkit.prepare(model, prefer="speed")
    torch.testing.assert_close(logits(model), expected)
    for name, layer in list(factorized_layers(model)):
        dense = dense_layer(layer)
        assert type(dense).__name__ == layer.replaces
        model.set_submodule(name, dense)
    torch.testing.assert_close(logits(model), expected)


def test_one_factorised_stack_beside_a_dense_one() -> None:
    model = model_of("GptOss")
    layer = model.model.layers[0].mlp.experts
    whole = copy.deepcopy(layer)
    tdkit.compress(model, Policy([Rule("*.0.*down_proj", LowRank(rank=4)), Rule("*", keep=True)]))
    assert model.model.layers[0].mlp.experts is layer  # the module keeps its identity
    assert layer.gate_up_proj is not None
    with torch.no_grad():
        whole.down_proj.copy_(layer.down_proj)
    x, index, weights = torch.randn(9, 16).double(), torch.randint(4, (9, 2)), torch.rand(9, 2).double()
    torch.testing.assert_close(layer(x, index, weights), whole(x, index, weights))
    with pytest.raises(AttributeError, match=r"the down_proj of a FactorizedGptOssExperts is read-only"):
        layer.down_proj = whole.down_proj


def test_only_experts_that_tokens_are_routed_to_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("Mixtral")
    tdkit.compress(model, Policy([Rule("*experts*proj", Kronecker(terms=1)), Rule("*", keep=True)]))
    layer = model.model.layers[0].mlp.experts
    called: list[int] = []
    for matrix in layer.matrices.values():
        for number, member in enumerate(matrix.members):
            member.register_forward_pre_hook(lambda *_, number=number: called.append(number))
    x, weights = torch.randn(5, 16).double(), torch.rand(5, 2).double()
    index = torch.tensor([[0, 3], [3, 0], [0, 3], [0, 4], [4, 3]])  # 4 is none: a slot of another process
    y = layer(x, index, weights)
    assert called == [0, 3, 0, 3]
    weights[3, 1] = weights[4, 0] = 0
    torch.testing.assert_close(layer(x, index.clamp(max=3), weights), y)
    for row in (slice(0, 1), slice(1, 2), slice(3, 4)):  # one token alone, as in generation
        torch.testing.assert_close(layer(x[row], index[row], weights[row]), y[row])
    torch.testing.assert_close(layer(x[:1], index[:1] * 0 + 4, weights[:1]), torch.zeros(1, 16).double())
    assert layer(x[:0], index[:0], weights[:0]).shape == (0, 16)


def test_gradients_of_the_forward_are_right() -> None:
    model = model_of("GptOss")
    layer = model.model.layers[0].mlp.experts
    index = torch.tensor([[0, 3], [3, 1]])
    x, weights = torch.randn(2, 16).double().requires_grad_(), torch.rand(2, 2).double().requires_grad_()
    torch.autograd.gradcheck(lambda x, w: experts_forward(layer, {}, {}, x, index, w), (x, weights))


def test_a_calibrated_fit_has_less_error_and_every_part_of_compression_takes_it(tmp_path: Path) -> None:
    model = model_of("Mixtral")
    batches = [ids(4, 32, seed) for seed in range(6)]
    known = tdkit.calibrate(model, batches)
    metric = known.metric(stacks(model)[0])
    assert metric is not None
    assert metric.input is not None
    assert metric.output is not None
    assert (metric.input.shape, metric.output.shape) == ((4, 16, 16), (4, 24, 24))
    known.save(tmp_path / "moments")
    again = Calibration.load(tmp_path / "moments").metric(stacks(model)[0])
    assert again is not None
    assert again.input is not None
    assert torch.equal(again.input, metric.input)
    policy = Policy(EXPERTS, budget=0.7)
    fresh, dense = ids(8, 32, 99), logits(model, ids(8, 32, 99))

    def gap(**options: Any) -> float:
        small = tdkit.compress(copy.deepcopy(model), policy, **options)
        return float((logits(small, fresh) - dense).norm() / dense.norm())

    plain = gap()
    assert gap(calibration=known) < 0.8 * plain
    assert gap(calibration=known.inputs_only()) < 0.8 * plain
    assert gap(calibration=known, passes=2) < 0.8 * plain
    assert gap(calibration=known, sequential=True) < 0.8 * plain
    assert "forward" not in vars(model.model.layers[0].mlp.experts)  # what calibration replaced is there again


def test_padding_is_not_calibrated_on() -> None:
    model = model_of("GptOss")
    batch, mask = ids(3, 21), torch.ones(3, 21, dtype=torch.long)
    mask[:, 15:] = 0
    labels = torch.where(mask.bool(), batch, -100)
    padded = tdkit.calibrate(model, [{"input_ids": batch, "attention_mask": mask, "labels": labels}])
    short = tdkit.calibrate(model, [batch[:, :15]])
    for name in stacks(model):
        found, expected = padded.metric(name), short.metric(name)
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found.input, expected.input)
        torch.testing.assert_close(found.output, expected.output)


def test_the_plan_counts_the_experts_of_a_token() -> None:
    plan = tdkit.plan(model_of("Mixtral"), Policy(EXPERTS, budget=0.7))
    step = next(step for step in plan.rewritten if step.name.endswith("0.mlp.experts.gate_up_proj"))
    assert step.shape == (4, 24, 16)
    assert isinstance(step.decomposition, Stacked)
    assert step.params_before == 4 * 24 * 16
    assert step.multiply_adds_before == 2 * 24 * 16  # two experts for each token
    assert isinstance(step.decomposition.each, LowRank)
    assert step.multiply_adds_after == 2 * int(step.decomposition.each.rank or 0) * (24 + 16)
    assert step.paths == ("right, left", "right, left")
    small = tdkit.compress(model_of("Mixtral"), plan)
    again = next(
        step for step in tdkit.applied_plan(small).rewritten if step.name.endswith("0.mlp.experts.gate_up_proj")
    )
    assert (again.multiply_adds_before, again.multiply_adds_after) == (768, step.multiply_adds_after)


@pytest.mark.parametrize("train", [False, True])
def test_the_benchmark_times_a_layer_of_experts(train: bool) -> None:
    model = tdkit.compress(model_of("Mixtral", torch.float32), Policy(EXPERTS, budget=0.7))
    found = benchmark(model, tokens=(4,), train=train, seconds=0.01)
    layer, whole = found.rows
    assert layer.what.startswith("MixtralExperts gate_up_proj 4x24x16 stacked(low_rank(rank=")
    assert layer.count == 2
    assert layer.path == ("right, left" if train else "dense, cached")  # the factors of so small a layer do not pay
    assert not found.skipped
    assert whole.seconds > layer.seconds > 0


def test_observers_are_removed_in_any_order() -> None:
    layer = model_of("Mixtral").model.layers[0].mlp.experts
    host = host_of(layer)
    assert isinstance(host, ExpertsHost)
    seen: list[str] = []

    def observer(name: str) -> Callable[[Routing, Tensor, Tensor], Tensor]:
        def observe(routing: Routing, x: Tensor, y: Tensor) -> Tensor:
            assert sum(routing.counts) == len(x) == len(y) == len(routing.tokens)
            seen.append(name)
            return y

        return observe

    handles = [host.attach_stack(layer, f"{name}_proj", observer(name)) for name in ("gate_up", "down")]
    call = partial(layer, torch.randn(3, 16).double(), torch.randint(4, (3, 2)), torch.rand(3, 2).double())
    expected = call()
    assert seen == ["gate_up", "down"]
    handles[0].remove()
    handles[0].remove()
    call()
    assert seen == ["gate_up", "down", "down"]
    handles[1].remove()
    torch.testing.assert_close(call(), expected)
    assert len(seen) == 3
    assert not {"forward", "_observers"} & set(vars(layer))
    with pytest.raises(TdkitError, match=r"weight of a Linear is no stack of matrices for its host 'linear'"):
        linear = nn.Linear(2, 2)
        host_of(linear).attach_stack(linear, "weight", observer("x"))  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [LowRank(), Kronecker(), Stacked(shared=True)], ids=lambda kind: kind.name)
def test_factors_are_offloaded_by_accelerate(kind: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tdkit.compress(model_of("GptOss"), Policy([Rule("*experts*proj", kind)], budget=0.7))
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(factor.is_meta for _, layer in factorized_layers(model) for factor in layer.parameters())
    torch.testing.assert_close(logits(model), expected)
    stack = next(layer for _, layer in factorized_layers(model)).matrices["down_proj"]
    if not isinstance(kind, Kronecker):
        with pytest.raises(TdkitError, match=r"the factors are on the meta device and hold no numbers"):
            cast(FactorizedStack, stack).grouped(torch.randn(4, 12), (1, 1, 1, 1))


def test_it_runs_under_torch_compile_with_graph_breaks() -> None:
    model = tdkit.compress(model_of("Mixtral"), Policy(EXPERTS, budget=0.7))
    expected = logits(model)
    torch.compiler.reset()
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), expected)
    torch.compiler.reset()


def test_experts_of_other_code_are_held_as_factors_and_computed_dense() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,eoi->no", x, self.gate_up_proj)

    model = nn.Sequential(Experts())
    (site,) = survey(model).sites
    assert not site.stacked
    x = torch.randn(3, 8)
    expected = model(x)
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=8))], allow_growth=True))
    torch.testing.assert_close(model(x), expected)
