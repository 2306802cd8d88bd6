"""MoDeGPT as published (Lin et al., 2024, "Modular Decomposition for Large Language Model Compression"), as a peer.

The three modules of each block of a LLaMA are compressed by the moments of their inputs: the MLP by the Nyström method
(type I, algorithm 1), queries and keys by CR, the choice of columns (type II, algorithm 2), values and outputs by SVD
(type III, algorithm 3). The share that each block loses is the same, or follows from how much the block changes its
input (section 3.3). With rotary embeddings, columns of queries and keys are chosen in the pairs that turn together;
with grouped queries, the heads of a group share the choice, and their outputs one basis (appendix B).

The weights keep their shapes here: what is removed is zero, or of low rank, which computes the same. Parameters are
counted as those of the smaller weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RIDGE = 1e-6  # of the mean of the diagonal, added where a moment is inverted


@dataclass
class Moments:
    """Of one block: E[x xᵀ] of the attention's input and of the MLP's hidden units, and the block's influence."""

    attention: Tensor
    hidden: Tensor
    influence: float


@torch.inference_mode()
def measure(model: nn.Module, batches: Sequence[Tensor]) -> list[Moments]:
    """The moments of all blocks, float64, summed over the tokens of `batches` (batch, tokens)."""
    layers: Any = model.get_submodule("model.layers")
    config: Any = model.config
    width, hidden = config.hidden_size, config.intermediate_size
    found = [
        Moments(torch.zeros(width, width).double(), torch.zeros(hidden, hidden).double(), 0.0)
        for _ in range(len(layers))
    ]
    seen = [0.0] * len(layers)
    handles = []

    def gram(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return (rows.T @ rows).double()

    for number, layer in enumerate(layers):

        def attention(_: nn.Module, args: tuple[Any, ...], number: int = number) -> None:
            found[number].attention += gram(args[0])

        def down(_: nn.Module, args: tuple[Any, ...], number: int = number) -> None:
            found[number].hidden += gram(args[0])

        def block(_: nn.Module, args: tuple[Any, ...], output: Any, number: int = number) -> None:
            x, y = args[0], output[0] if isinstance(output, tuple) else output
            changed = 1 - torch.cosine_similarity(x, y, dim=-1)
            found[number].influence += float(changed.sum())
            seen[number] += changed.numel()

        handles += [
            layer.self_attn.q_proj.register_forward_pre_hook(attention),
            layer.mlp.down_proj.register_forward_pre_hook(down),
            layer.register_forward_hook(block),
        ]
    for batch in batches:
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    for moments, tokens in zip(found, seen, strict=True):
        moments.influence /= tokens
    return found


def shares_lost(moments: Sequence[Moments], average: float, temperature: float | None) -> list[float]:
    """The share of its parameters that each block loses; the same for all without a temperature (section 3.3)."""
    if temperature is None:
        return [average] * len(moments)
    scores = torch.tensor([-each.influence / temperature for each in moments])
    shares = len(moments) * average * torch.softmax(scores, 0)
    while float(shares.max()) > 0.95:  # nothing is left of a block that loses more: the others lose it instead
        over = shares > 0.95
        surplus = float((shares[over] - 0.95).sum())
        shares[over] = 0.95
        free = shares < 0.95
        shares[free] += surplus * shares[free] / shares[free].sum()
    return shares.tolist()


@torch.no_grad()
def compress(model: nn.Module, moments: Sequence[Moments], shares: Sequence[float]) -> int:
    """Compress the blocks of a LLaMA in place; returns the number of parameters that are left of them."""
    layers: Any = model.get_submodule("model.layers")
    left = 0
    for layer, seen, lost in zip(layers, moments, shares, strict=True):
        left += _mlp(layer.mlp, seen.hidden, 1 - lost)
        left += _attention(layer.self_attn, seen.attention, 1 - lost)
    return left


def _mlp(mlp: Any, moment: Tensor, keep: float) -> int:
    units = len(moment)
    count = max(1, round(keep * units))
    ridged = moment + torch.eye(units).double() * moment.diagonal().mean()
    scores = torch.linalg.solve(ridged, moment).diagonal()
    kept = scores.topk(count).indices.sort().values
    chosen = moment[kept][:, kept]
    chosen += torch.eye(count).double() * RIDGE * chosen.diagonal().mean()
    refit = torch.linalg.solve(chosen, moment[kept] @ mlp.down_proj.weight.double().T)
    down = torch.zeros_like(mlp.down_proj.weight)
    down[:, kept] = refit.T.to(down.dtype)
    mlp.down_proj.weight.copy_(down)
    return 3 * count * mlp.down_proj.weight.shape[0]


def _attention(attention: Any, moment: Tensor, keep: float) -> int:
    size, groups = attention.head_dim, attention.config.num_key_value_heads
    width = len(moment)
    heads = attention.config.num_attention_heads // groups
    root, inverse = _roots(moment)
    half = size // 2
    pairs, rank = max(1, round(keep * half)), max(1, round(keep * size))
    q = attention.q_proj.weight.view(groups, heads, size, width)
    k = attention.k_proj.weight.view(groups, size, width)
    v = attention.v_proj.weight.view(groups, size, width)
    o = attention.o_proj.weight.view(width, groups, heads, size)
    for group in range(groups):
        queries = (q[group].double() @ root).square().sum((0, 2))  # (head_dim,) over the heads of the group
        keys = (k[group].double() @ root).square().sum(1)
        scores = (queries * keys).sqrt().view(2, half).sum(0)
        gone = scores.topk(half - pairs, largest=False).indices
        dims = torch.cat([gone, gone + half])
        q[group][:, dims] = 0
        k[group][dims] = 0
        outer = o[:, group].permute(2, 1, 0).reshape(size, -1).double()  # (head_dim, heads * width)
        left, values, right = torch.linalg.svd(root @ v[group].double().T, full_matrices=False)
        inner, scale, back = torch.linalg.svd(values[:, None] * right @ outer, full_matrices=False)
        new_v = torch.zeros(size, width).double()
        new_o = torch.zeros(size, outer.shape[1]).double()
        new_v[:rank] = (inverse @ left @ inner[:, :rank]).T
        new_o[:rank] = scale[:rank, None] * back[:rank]
        v[group] = new_v.to(v.dtype)
        o[:, group] = new_o.view(size, heads, width).permute(2, 1, 0).to(o.dtype)
    return width * groups * (heads + 1) * (2 * pairs + rank)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=RIDGE * float(values.mean()))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
