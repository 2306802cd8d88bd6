"""A student that starts from another one has its weights and buffers, or an error names what does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tdkit
import torch
from distill_models import bert, factorized, gpt2, ids, same_weights

from tdkit_distill.errors import StageError
from tdkit_distill.models.transfer import take_weights

MLP = "*.intermediate.dense"


def compressed(model: Any, pattern: str, kind: Any) -> Any:
    return tdkit.compress(model, tdkit.Policy([tdkit.Rule(pattern, kind)]))


def test_a_permuted_student_takes_the_orders_with_the_factors() -> None:
    kind = tdkit.PermutedKronecker(terms=2, b=(4, 2))
    source, student = (compressed(gpt2(seed=seed), "*.mlp.*", kind).eval() for seed in (1, 2))
    matrix = student.transformer.h[0].mlp.c_fc.matrix
    assert not torch.equal(matrix.row_order, source.transformer.h[0].mlp.c_fc.matrix.row_order)
    student(ids(2))  # what is cached of the old factors must not answer after the copy
    done = take_weights(student, source, "there")
    assert "transformer.h.0.mlp.c_fc" in done.taken
    assert not done.missing
    assert not done.unused
    assert same_weights(student, source)
    with torch.no_grad():
        assert torch.equal(student(ids(2)).logits, source(ids(2)).logits)


def test_every_layer_of_another_rank_is_named_with_its_shapes_and_nothing_is_written() -> None:
    source, student = compressed(bert(), MLP, tdkit.LowRank(rank=4)), compressed(bert(), MLP, tdkit.LowRank(rank=6))
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(StageError, match=r"start: there does not fit this student") as caught:
        take_weights(student, source, "there")
    factors = {name: tuple(p.shape) for name, p in student.named_parameters() if ".matrix." in name}
    assert len(factors) == 4
    for name, shape in factors.items():
        other = tuple(dict(source.named_parameters())[name].shape)
        assert f"{name}: {other} there, {shape} here" in str(caught.value)
    assert "Compress this student by the rules, ranks and factor shapes that there was compressed by" in str(
        caught.value
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("swapped", [False, True])
def test_a_layer_that_is_factorised_in_one_of_the_two_only(swapped: bool) -> None:
    pair = [compressed(bert(), MLP, tdkit.LowRank(rank=4)), bert()]
    source, student = reversed(pair) if swapped else pair
    here, there = ("missing", r"\(64, 32\)") if swapped else (r"\(64, 32\)", "missing")
    with pytest.raises(StageError, match=f"layer.1.intermediate.dense.weight: {there} there, {here} here"):
        take_weights(student, source, "there")


def test_permuted_and_plain_factors_do_not_mix() -> None:
    plain = compressed(gpt2(), "*.mlp.*", tdkit.Kronecker(terms=2, b=(4, 2)))
    permuted = compressed(gpt2(), "*.mlp.*", tdkit.PermutedKronecker(terms=2, b=(4, 2)))
    with pytest.raises(StageError, match=r"h.0.mlp.c_fc.matrix.row_order: \(64,\) there, missing here"):
        take_weights(plain, permuted, "there")


def test_heads_may_differ_and_are_told() -> None:
    from transformers import BertForMaskedLM, BertForSequenceClassification

    config = bert().config
    general = compressed(BertForMaskedLM(config), MLP, tdkit.LowRank(rank=4))
    student = compressed(bert(seed=1), MLP, tdkit.LowRank(rank=4))
    head = copy.deepcopy(student.classifier.state_dict())
    done = take_weights(student, general, "general")
    assert set(done.missing) == {"bert.pooler.dense", "classifier"}
    assert "cls.predictions.transform.dense" in done.unused
    told = "\n".join(done.lines("general"))
    assert f"{len(done.taken)} layers taken from general" in told
    assert "left as they are: bert.pooler.dense, classifier" in told
    assert "cls.predictions" in told
    assert all(torch.equal(head[name], tensor) for name, tensor in student.classifier.state_dict().items())
    factors = ("bert.encoder.layer.1.intermediate.dense.matrix", "bert.embeddings.word_embeddings")
    assert all(same_weights(student.get_submodule(n), general.get_submodule(n)) for n in factors)
    config = copy.deepcopy(config)
    config.num_labels = 5
    wide = compressed(BertForSequenceClassification(config), MLP, tdkit.LowRank(rank=4))
    assert take_weights(student, wide, "wide").missing == ("classifier",)


def test_a_base_layer_of_another_shape_is_no_head() -> None:
    with pytest.raises(StageError, match=r"transformer.wte.weight: \(40, 16\) there, \(48, 16\) here"):
        take_weights(gpt2(), gpt2(vocabulary=40), "there")


def test_a_tie_that_the_source_lacks() -> None:
    source = gpt2(seed=1)
    source.lm_head.weight = torch.nn.Parameter(source.lm_head.weight.detach() + 1)
    with pytest.raises(StageError, match=r"transformer.wte.weight and lm_head.weight: two tensors there, one"):
        take_weights(gpt2(), source, "there")
    student = factorized()  # here embedding and head share their factors
    assert take_weights(student, factorized(), "there").taken


def test_nothing_in_common() -> None:
    with pytest.raises(StageError, match=r"has no layer in common .* Give a folder that was saved from the same"):
        take_weights(gpt2(), bert(), "there")
