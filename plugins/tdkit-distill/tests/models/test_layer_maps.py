"""Layer maps: by depth, by pattern, by name; nothing matched is an error that helps."""

from __future__ import annotations

import pytest
from distill_models import Plain, bert, gpt2, llama

from tdkit_distill.errors import StageError
from tdkit_distill.models.layer_maps import (
    ATTENTION,
    EMBEDDING,
    FEED_FORWARD,
    blocks,
    by_depth,
    first_existing,
    map_layers,
)


def test_by_depth_ends_with_the_last_layer() -> None:
    names = [f"t{k}" for k in range(6)]
    assert by_depth(["a", "b", "c"], names) == (("a", "t1"), ("b", "t3"), ("c", "t5"))
    assert by_depth(names[:3], names[:3]) == tuple((n, n) for n in names[:3])
    assert by_depth(["a"], names) == (("a", "t5"),)
    assert [t for _, t in by_depth(names, ["x", "y"])] == ["x", "x", "x", "y", "y", "y"]


@pytest.mark.parametrize(
    ("build", "block", "ffn", "attention", "embedding"),
    [
        (gpt2, "transformer.h.0", "mlp", "attn", "transformer.wte"),
        (llama, "model.layers.0", "mlp", "self_attn", "model.embed_tokens"),
        (bert, "bert.encoder.layer.0", "output.dense", "attention.self", "bert.embeddings"),
    ],
)
def test_the_usual_parts_are_found(build, block: str, ffn: str, attention: str, embedding: str) -> None:  # type: ignore[no-untyped-def]
    model = build()
    assert blocks(model)[0] == block
    assert map_layers(model, model, "all", inside=FEED_FORWARD, place="x")[0] == (f"{block}.{ffn}",) * 2
    assert map_layers(model, model, "all", inside=ATTENTION, place="x")[0] == (f"{block}.{attention}",) * 2
    assert first_existing(model, EMBEDDING, "x") == embedding


def test_patterns_and_mappings() -> None:
    student, teacher = gpt2(2), gpt2(4)
    assert map_layers(student, teacher, "transformer.h.*.mlp", place="x") == (
        ("transformer.h.0.mlp", "transformer.h.1.mlp"),
        ("transformer.h.1.mlp", "transformer.h.3.mlp"),
    )
    assert map_layers(Plain(), teacher, {"blocks.1": "transformer.h.2"}, place="x") == (
        ("blocks.1", "transformer.h.2"),
    )
    assert map_layers(student, teacher, r"re:transformer\.h\.\d+\.ln_2", place="x")[1][1] == "transformer.h.3.ln_2"
    with pytest.raises(StageError, match=r"teacher layers 'transformer.h.9' match no module; did you mean"):
        map_layers(student, teacher, {"transformer.h.0": "transformer.h.9"}, place="loss 'hidden'")
    with pytest.raises(StageError, match=r"loss 'ffn': student layers like 'blocks.0' have none of mlp"):
        map_layers(Plain(), teacher, "all", inside=FEED_FORWARD, place="loss 'ffn'")
