"""Attention that computes with heads of the size that `Shrink` left."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

import tdkit
from tdkit import Policy, Rule, Shrink
from tdkit.models.small_heads import SmallHeads, _heads_of, use_small_heads
from tests.conftest import make_llama


def shrunk(budget: float = 0.6, **options: Any) -> Any:
    """A LLaMA whose heads of 16 lost dimensions, in eval mode."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = make_llama(**{**sizes, "num_hidden_layers": 3, **options})
    rule = Rule("model.layers.*.self_attn.*", Shrink(multiple=1), budget=budget)
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    return tdkit.compress(model, Policy([rule], allocation="loss"), calibration=[ids])


def by_its_own_code(model: Any) -> Any:
    """A copy whose layers run the code of transformers."""
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        if isinstance(layer.self_attn, SmallHeads):
            layer.self_attn.__class__ = layer.self_attn.dense_class
    return plain


def tokens(length: int = 11, batch: int = 2) -> Tensor:
    return torch.randint(0, 60, (batch, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def made() -> Any:
    return shrunk()


def test_compress_and_load_use_them(made: Any, tmp_path: Path) -> None:
    for model in (made, tdkit.load(tdkit.save(made, tmp_path / "small"))):
        attention = [layer.self_attn for layer in model.model.layers]
        assert any(isinstance(each, SmallHeads) for each in attention)
        assert {type(each).__name__ for each in attention} == {"LlamaAttention"}
    assert {k: v.shape for k, v in made.state_dict().items()} == {
        k: v.shape for k, v in by_its_own_code(made).state_dict().items()
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [0.3, 0.6, 0.9])
def test_the_numbers_are_those_of_the_layers_own_code(implementation: str, budget: float) -> None:
    model = shrunk(budget, attn_implementation=implementation).double()
    plain = by_its_own_code(model)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(5, 16)[None]}):
            found, expected = model(tokens(), **options).logits, plain(tokens(), **options).logits
            assert torch.allclose(found[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-11, equal_nan=True)
            assert options or not found.isnan().any()  # of a masked row, float64 eager attention of transformers is NaN


def test_text_is_continued_alike_with_a_smaller_cache(made: Any) -> None:
    plain = by_its_own_code(made)
    ids = tokens(5, 1)
    with torch.no_grad():
        both = [model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (made, plain)]
        caches = [model(ids, use_cache=True).past_key_values for model in (made, plain)]
    assert torch.equal(*both)
    sizes = [sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) for cache in caches]
    assert sizes[0] < 0.8 * sizes[1]


def test_a_cache_is_gone_on_with_as_it_was_begun(made: Any) -> None:
    ids = tokens(6, 1)
    with torch.no_grad():
        expected = made(ids).logits[:, 4:]
        cache = made(ids[:, :4], use_cache=True).past_key_values
    with_gradients = made(ids[:, 4:], past_key_values=copy.deepcopy(cache)).logits
    assert torch.allclose(with_gradients, expected, atol=1e-5)
    begun = made(ids[:, :4], use_cache=True).past_key_values  # by the layers' own code
    with torch.no_grad():
        assert torch.allclose(made(ids[:, 4:], past_key_values=begun).logits, expected, atol=1e-5)
        static = made.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static", pad_token_id=0)
        assert torch.equal(static, made.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_hooks_and_gradients_see_the_projections(made: Any) -> None:
    model = copy.deepcopy(made)
    seen: list[str] = []
    layer = next(each.self_attn for each in model.model.layers if isinstance(each.self_attn, SmallHeads))
    handle = layer.k_proj.register_forward_hook(lambda *_: seen.append("k"))
    with torch.no_grad():
        hooked = model(tokens()).logits
    handle.remove()
    assert seen == ["k"]
    with torch.no_grad():
        assert torch.allclose(hooked, model(tokens()).logits, atol=1e-5)
    assert seen == ["k"]
    model(tokens()).logits.sum().backward()
    assert layer.k_proj.matrix.weight.grad is not None


def test_copies_pickles_and_changes_are_followed(made: Any) -> None:
    for model in (copy.deepcopy(made), pickled(made)):
        layer = next(each.self_attn for each in model.model.layers if isinstance(each.self_attn, SmallHeads))
        with torch.no_grad():
            model(tokens())
            layer.q_proj.matrix.weight.mul_(2.0)
            assert torch.allclose(model(tokens()).logits, by_its_own_code(model)(tokens()).logits, atol=1e-5)
            places = layer.k_proj.matrix.row_places
            places[0] = (places[0] + 1) % 2  # the pairs of keys are others now, those of queries not
            assert torch.allclose(model(tokens()).logits, by_its_own_code(model)(tokens()).logits, atol=1e-5)
        tdkit.to_dense(model)
        assert torch.allclose(model(tokens()).logits, by_its_own_code(model)(tokens()).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_parametrized_and_replaced_projections_are_followed(made: Any, name: str) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for index in range(len(made.model.layers)):
        model = copy.deepcopy(made)
        with torch.no_grad():
            before = model(tokens()).logits
            projection = getattr(model.model.layers[index].self_attn, name)
            parametrize.register_parametrization(getattr(projection, "matrix", projection), "weight", Doubled())
            found = model(tokens()).logits
            assert torch.allclose(found, by_its_own_code(model)(tokens()).logits, atol=1e-5)
            assert not torch.allclose(found, before, atol=1e-5)
            model = copy.deepcopy(made)
            model(tokens())
            setattr(model.model.layers[index].self_attn, name, torch.nn.Linear(64, projection.out_features))
            assert torch.allclose(model(tokens()).logits, by_its_own_code(model)(tokens()).logits, atol=1e-5)


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_uneven_heads_run_the_layers_own_code(made: Any) -> None:
    layer = copy.deepcopy(next(each.self_attn for each in made.model.layers if isinstance(each.self_attn, SmallHeads)))
    assert _heads_of(layer) is not None
    places = layer.k_proj.matrix.row_places
    places[0] = 1 - min(int(places[0]), 1)  # of keys, and not of queries
    assert _heads_of(layer) is None


def test_other_models_stay_as_they_are() -> None:
    model = make_llama()
    use_small_heads(model)
    assert not any(isinstance(module, SmallHeads) for module in model.modules())
