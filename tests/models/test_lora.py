"""peft's LoRA on factorised layers: where adapters land, what they compute, how they are saved, loaded and merged."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import Kronecker, LowRank, Policy, Rule
from tdkit.errors import AdapterError, MissingDependencyError, TdkitError
from tdkit.models.hosts.base import FactorizedModule
from tests.conftest import TiedModel, make_gpt2, make_llama
from tests.side_packages import use_torchao

peft = pytest.importorskip("peft")

from tdkit.models.lora import LoraEmbedding, LoraLinear, for_factorized  # noqa: E402, needs peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging"),
]

LOW_RANK = Policy([Rule("*", LowRank(rank=3))])


def compressed(model: Any, policy: Policy = LOW_RANK) -> Any:
    return tdkit.compress(model, policy, progress=False)


def adapted(model: Any, *targets: str, **options: Any) -> Any:
    """A model with random adapters: peft's own start at zero."""
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)
    return peft.get_peft_model(model, for_factorized(config, model)).eval()


@pytest.mark.parametrize(
    ("make", "targets", "count"),
    [(make_llama, ["q_proj", "down_proj", "embed_tokens"], 5), (make_gpt2, ["c_attn", "c_fc", "wte"], 9)],
)
def test_adapters_are_added_to_the_outputs_of_factorised_layers(
    make: Any, targets: list[str], count: int, ids: Tensor
) -> None:
    model = compressed(make())
    before = copy.deepcopy(model)
    tuned = adapted(model, *targets)
    found = {name: each for name, each in tuned.named_modules() if isinstance(each, LoraLinear | LoraEmbedding)}
    assert len(found) == count
    for layer in found.values():
        scaling = layer.scaling["default"]
        if isinstance(layer, LoraLinear):
            x = torch.randn(5, layer.in_features)
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            delta = x @ down.T @ up.T
        else:
            x = torch.randint(40, (5,))
            delta = layer.lora_embedding_A["default"].T[x] @ layer.lora_embedding_B["default"].T
        torch.testing.assert_close(layer(x), layer.base_layer(x) + scaling * delta)
    with tuned.disable_adapter():
        assert torch.equal(tuned(ids).logits, before(ids).logits)
    assert not torch.allclose(tuned(ids).logits, before(ids).logits, atol=1e-3)


def test_a_saved_adapter_loads_on_a_freshly_loaded_model(ids: Tensor, tmp_path: Path) -> None:
    model = compressed(make_llama())
    tdkit.save(model, tmp_path / "smaller")
    tuned = adapted(model, "q_proj", "down_proj", "embed_tokens")
    expected = tuned(ids).logits
    tuned.save_pretrained(tmp_path / "adapter")
    from safetensors.torch import load_file

    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    fresh: Any = tdkit.load(tmp_path / "smaller")
    config = for_factorized(peft.LoraConfig.from_pretrained(tmp_path / "adapter"), fresh)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=config).eval()
    assert torch.equal(again(ids).logits, expected)


def test_a_model_read_by_from_pretrained_is_adapted(ids: Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tdkit.save(compressed(make_llama()), tmp_path / "smaller")
    tuned = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "smaller"), "q_proj", "down_proj")
    expected = tuned(ids).logits
    tuned.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    config = for_factorized(peft.LoraConfig.from_pretrained(tmp_path / "adapter"), fresh)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=config).eval()
    assert torch.equal(again(ids).logits, expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)


def test_transformers_own_call_takes_the_config(ids: Tensor) -> None:
    model = compressed(make_llama())
    before = model(ids).logits
    model.add_adapter(for_factorized(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model))
    assert not torch.equal(model(ids).logits, before)
    model.disable_adapters()
    assert torch.equal(model(ids).logits, before)


def test_all_linear_means_dense_and_factorised_layers(untied_gpt2: Any) -> None:
    model = compressed(untied_gpt2, Policy([Rule("*.c_fc", LowRank(rank=3)), Rule("lm_head", LowRank(rank=3))]))
    dense = {name for name, each in make_gpt2().named_modules() if type(each).__name__ == "Conv1D"}
    config = for_factorized(peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=True), model)
    assert config.target_modules == dense  # as of the dense model; the head is none of them
    tuned = peft.get_peft_model(model, config)
    assert sum(isinstance(each, LoraLinear) for each in tuned.modules()) == 4


def test_peft_itself_misses_factorised_layers(untied_gpt2: Any) -> None:
    """The two facts about peft for which `for_factorized` exists."""
    model = compressed(untied_gpt2, Policy([Rule("*.c_fc", LowRank(rank=3))]))
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    expanded = _maybe_include_all_linear_layers(peft.LoraConfig(target_modules="all-linear"), model)
    assert not any(name.endswith("c_fc") for name in expanded.target_modules)
    with pytest.raises(ValueError, match=r"(?s)Target module FactorizedConv1D.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_fc"]))


def test_all_linear_of_a_model_without_such_layers_is_told() -> None:
    with pytest.raises(AdapterError, match="'all-linear' matches no layer of Sequential"):
        for_factorized(peft.LoraConfig(target_modules="all-linear"), nn.Sequential(nn.ReLU()))


def test_a_model_of_no_library_is_adapted(tied: TiedModel, ids: Tensor) -> None:
    model = compressed(tied)
    before = model(ids)
    tuned = peft.get_peft_model(model, for_factorized(peft.LoraConfig(target_modules="all-linear"), model))
    assert torch.equal(tuned(ids), before)  # an adapter starts at zero
    assert sum(isinstance(each, LoraLinear) for each in tuned.modules()) == 3


def test_training_changes_adapters_only(ids: Tensor) -> None:
    model = compressed(make_llama(initializer_range=0.3), Policy([Rule("model.layers.*", LowRank(rank=3))]))
    config = for_factorized(peft.LoraConfig(r=4, target_modules="all-linear"), model)
    tuned = peft.get_peft_model(model, config)
    factors = {name: each.clone() for name, each in tuned.named_parameters() if "lora_" not in name}
    optimizer = torch.optim.Adam([each for each in tuned.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = tuned(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(each, factors[name]) for name, each in tuned.named_parameters() if name in factors)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_widens_low_rank_factors(make: Any, safe: bool, ids: Tensor, tmp_path: Path) -> None:
    model = compressed(make())
    before = copy.deepcopy(model)
    tuned = adapted(model, *(["q_proj", "embed_tokens"] if make is make_llama else ["c_attn", "wte"]))
    expected = tuned(ids).logits
    tuned.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(tuned(ids).logits, expected)
    tuned.unmerge_adapter()
    assert torch.equal(tuned(ids).logits, expected)
    merged = tuned.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(ids).logits, expected)
    ranks = [step.decomposition for step in tdkit.applied_plan(merged).rewritten]
    assert LowRank(rank=5) in ranks
    assert LowRank(rank=3) in ranks  # of layers without an adapter
    tdkit.save(merged, tmp_path / "merged")
    assert torch.equal(tdkit.load(tmp_path / "merged")(ids).logits, merged(ids).logits)
    assert not torch.allclose(before(ids).logits, expected, atol=1e-3)


def test_a_bias_is_merged_too(gpt2: Any, ids: Tensor) -> None:
    tuned = adapted(compressed(gpt2), "c_fc", lora_bias=True)
    expected = tuned(ids).logits
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected)


@pytest.mark.parametrize(
    ("policy", "r", "message"),
    [
        (Policy([Rule("*.q_proj", Kronecker(terms=2, b=(2, 4)))]), 2, "into kronecker.*only low rank can take up"),
        (Policy([Rule("*.q_proj", LowRank(rank=14))]), 20, r"into low_rank.*: a rank of 34 is above the full rank"),
    ],
)
def test_other_merges_are_refused_with_the_remedy(policy: Policy, r: int, message: str, ids: Tensor) -> None:
    model = compressed(make_llama(), policy)
    config = peft.LoraConfig(r=r, target_modules=["q_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, for_factorized(config, model)).eval()
    expected = tuned(ids).logits
    with pytest.raises(AdapterError, match=f"adapter 'default' cannot be merged {message}.*Keep the adapter beside"):
        tuned.merge_and_unload()
    assert torch.equal(tuned(ids).logits, expected)


def test_what_is_not_finite_is_not_merged_safely(llama: Any) -> None:
    tuned = adapted(compressed(llama), "q_proj")
    layer = next(each for each in tuned.modules() if isinstance(each, LoraLinear))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="'default' has weights that are not finite"):
        tuned.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"use_dora=True: factorised layers take plain LoRA"),
        ({"init_lora_weights": "pissa"}, r"'pissa' changes the dense weight.*give one of True, False, 'gaussian'"),
        ({"init_lora_weights": "olora"}, r"'olora' changes the dense weight"),
    ],
)
def test_what_needs_the_dense_weight_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        for_factorized(peft.LoraConfig(**options), nn.Linear(2, 2))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_starts_that_leave_the_factors_alone(start: Any, llama: Any) -> None:
    model = compressed(llama)
    factors = [each.clone() for each in model.parameters()]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    tuned = peft.get_peft_model(model, for_factorized(config, model))
    kept = [each for name, each in tuned.named_parameters() if "lora_" not in name]
    assert all(torch.equal(a, b) for a, b in zip(kept, factors, strict=True))


def test_every_variant_of_peft_is_known() -> None:
    """A variant that peft adds would otherwise reach the layer, which says less than `for_factorized`."""
    import dataclasses

    from tdkit.models.lora import VARIANTS

    marked = {each.name for each in dataclasses.fields(peft.LoraConfig) if each.metadata.get("is_lora_variant")}
    assert marked <= set(VARIANTS)


def test_other_methods_of_peft_are_told() -> None:
    with pytest.raises(AdapterError, match=r"IA3Config is no peft.LoraConfig: of peft's methods only LoRA"):
        for_factorized(peft.IA3Config(), nn.Linear(2, 2))


class TestAdaptersBeforeCompression:
    """A model that is compressed when it has adapters of peft's own classes."""

    @pytest.fixture
    def tuned(self) -> Any:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
        return peft.get_peft_model(make_llama(), config).eval()

    def test_it_computes_with_the_factors_and_the_adapter(self, tuned: Any, ids: Tensor) -> None:
        tdkit.compress(tuned, Policy([Rule("*", LowRank(rank=3))]), progress=False)
        layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
        assert isinstance(layer.base_layer, FactorizedModule)
        x = torch.randn(5, 32)
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        torch.testing.assert_close(layer(x), x @ (layer.base_layer.matrix.dense() + delta).T)
        table = tuned.base_model.model.model.embed_tokens
        rows = table.lora_embedding_A["default"].T[ids] @ table.lora_embedding_B["default"].T
        torch.testing.assert_close(table(ids), table.base_layer(ids) + rows * table.scaling["default"])

    @pytest.mark.parametrize("safe", [False, True])
    def test_merging_is_an_error_not_a_loss(self, tuned: Any, safe: bool, ids: Tensor) -> None:
        tdkit.compress(tuned, Policy([Rule("*", LowRank(rank=3))]), progress=False)
        expected = tuned(ids).logits
        with pytest.raises(TdkitError, match=r"is read-only.*would be lost.*adapter.*kept beside the model"):
            tuned.merge_and_unload(safe_merge=safe)
        assert torch.equal(tuned(ids).logits, expected)


def test_without_peft_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners", None)
    monkeypatch.delitem(sys.modules, "tdkit.models.lora")
    with pytest.raises(MissingDependencyError, match=r"pip install 'tdkit\[peft\]'"):
        importlib.import_module("tdkit.models.lora")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_factors_take_adapters(bits: int, ids: Tensor) -> None:
    use_torchao()
    model = make_llama(hidden_size=64, intermediate_size=64, initializer_range=0.3)
    tdkit.quantize(compressed(model, Policy([Rule("model.layers.*", LowRank(rank=8))])), bits=bits)
    before = model(ids).logits
    tuned = peft.get_peft_model(model, for_factorized(peft.LoraConfig(r=2, target_modules="all-linear"), model))
    assert torch.equal(tuned(ids).logits, before)
    trained = [each for each in tuned.parameters() if each.requires_grad]
    assert len(trained) == 28
    assert {each.dtype for each in trained} == {torch.float32}
    tuned(ids, labels=ids).loss.backward()
    assert sum(float(each.grad.abs().sum()) > 0 for each in trained if each.grad is not None) == 14  # B; A follows
    with pytest.raises(AdapterError, match="cannot be merged into"):
        tuned.merge_and_unload()
