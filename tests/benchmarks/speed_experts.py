"""A layer of experts of Mixtral's shape, an eighth as wide, by factors: the part of speed.py about it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdkit import Kronecker, LowRank, Stacked
from tdkit.models.hosts.experts import ExpertsHost
from tdkit.models.preparation import prepare
from tests.benchmarks.calls import Row, compared, filled

HIDDEN, INTERMEDIATE, EXPERTS, OF_A_TOKEN = 512, 1792, 8, 2
TOKENS = (1, 16, 512)
KINDS = (
    *(Stacked(each=LowRank()), Stacked(shared=True, side="input"), Stacked(shared=True, side="output")),
    Stacked(each=Kronecker()),
)
SHARES = (0.5, 0.8)  # of the parameters
COLUMNS = ["tokens", "decomposition", "share", "dense_ms", "eager", "memory", "speed", "peak"]
ROUNDS = 15
DENSE = "grouped_mm"  # the implementation that transformers chooses


def dense_layer(implementation: str) -> nn.Module:
    """The dense layer of transformers, without gradients."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=OF_A_TOKEN,
        experts_implementation=implementation,
    )
    layer = MixtralExperts(config).requires_grad_(False).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def measure(seconds: float) -> list[Row]:
    """The time of each case, preferring memory and preferring speed, as ratios to the dense layer's."""
    rows, host = [], ExpertsHost()
    dense, eager = dense_layer(DENSE), dense_layer("eager")
    for tokens, kind, share in itertools.product(TOKENS, KINDS, SHARES):
        matrices: dict[str, Any] = {}
        for name in host.weights(dense):
            shape = tuple(getattr(dense, name).shape)
            choice = kind.complete(shape, int(share * getattr(dense, name).numel()))
            assert choice is not None
            matrices[name] = filled(choice, shape).requires_grad_(False)
        small = host.build(dense, matrices, {}).eval()
        fast = prepare(copy.deepcopy(small), prefer="speed")
        layers = {"dense": dense, "eager": eager, "memory": small, "speed": fast}
        routes = [routed(tokens, seed) for seed in range(4)]  # a few tokens meet other experts in the next call
        calls = {name: in_turn(layer, routes) for name, layer in layers.items()}
        rows.append(
            {
                "tokens": tokens,
                "decomposition": kind.describe(),
                "share": share,
                **compared(calls, fast, seconds=seconds, min_rounds=ROUNDS),
            }
        )
        print(rows[-1], flush=True)
    return rows


def routed(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of a layer: hidden states, the experts of each token and their weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS, generator=generator).topk(OF_A_TOKEN)
    return torch.randn(tokens, HIDDEN, generator=generator), scores.indices, scores.values


def in_turn(layer: nn.Module, routes: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[[], object]:
    """A call of the layer with the next of several inputs."""
    turns = itertools.cycle(routes)
    return lambda: layer(*next(turns))
