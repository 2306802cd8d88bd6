"""Compute the experts of a mixture-of-experts layer, each on the tokens that are routed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.decompositions.stacks import FactorizedStack, dense_grouped
from tdkit.errors import TdkitError
from tdkit.products.recording import needs_plain_operations
from tdkit.support.compatibility import only_calls_forward


@dataclass(frozen=True)
class Routing:
    """The rows of one call of a layer of experts: one for each expert of each token, those of expert 0 first.

    Attributes:
        tokens: the token of each row, (rows,) int64.
        counts: the number of rows of each expert.
        of: the number of tokens.
    """

    tokens: Tensor
    counts: Sequence[int]
    of: int


StackObserver = Callable[[Routing, Tensor, Tensor], Tensor]
"""``(routing, x, y) -> y``: called with the inputs (rows, in) and outputs (rows, out) of the products of a call with
a stack of matrices; its result replaces y."""

Observers = Mapping[str, Sequence[StackObserver]]


def experts_forward(
    module: nn.Module,
    matrices: Mapping[str, FactorizedMatrix],
    observers: Observers,
    hidden_states: Tensor,  # (*tokens, in)
    top_k_index: Tensor,  # (tokens, k) integers; experts at or above the number of experts are skipped
    top_k_weights: Tensor,  # (tokens, k)
) -> Tensor:  # (*tokens, in)
    """Returns the sum over the experts of each token, weighted: down(act(up(x))), as transformers computes it.

    Args:
        module: a layer of experts of transformers, which gives the activation, the biases and the layout.
        matrices: the factorised weights, by name; the others are those of `module`.
        observers: of the products, by the name of the weight.
    """
    if needs_plain_operations():
        return _every_expert(module, matrices, observers, hidden_states, top_k_index, top_k_weights)
    given: Any = module
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids = top_k_index.reshape(-1)
    experts = _experts(module, matrices)
    if len(flat) == 1 and not observers:
        y = _one_token(module, matrices, flat, ids.tolist(), top_k_weights.reshape(-1), experts)
        if y is not None:
            return y.to(hidden_states.dtype).view(hidden_states.shape)
    order, counts = _rows_of(ids, experts)

    def product(name: str, x: Tensor) -> Tensor:
        bias = getattr(module, f"{name}_bias") if given.has_bias else None
        y = _grouped(module, name, matrices.get(name), x, counts, bias)
        for observe in observers.get(name, ()):
            y = observe(Routing(order // top_k_index.shape[-1], counts, len(flat)), x, y)
        return y

    outer = _expert(given, product, flat[order // top_k_index.shape[-1]])
    weighted = outer * top_k_weights.reshape(-1)[order, None]
    every = weighted.new_zeros(len(ids), weighted.shape[-1]).index_copy(0, order, weighted)
    summed = every.view(len(flat), top_k_index.shape[-1], every.shape[-1]).sum(1)  # index_add is not deterministic
    return summed.to(hidden_states.dtype).view(hidden_states.shape)


def _rows_of(ids: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """The places of the rows in `ids`, those of expert 0 first, and the number of rows of each expert."""
    order = ids.argsort(stable=True)
    counts: list[int] = torch.bincount(ids, minlength=experts)[:experts].tolist()
    return order[: sum(counts)], counts


def _one_token(
    module: nn.Module,
    matrices: Mapping[str, FactorizedMatrix],
    x: Tensor,  # (1, in)
    chosen: Sequence[int],  # its experts, k
    weights: Tensor,  # (k,)
    experts: int,
) -> Tensor | None:  # (1, in)
    """The same for a single token by dense stacks, in as few steps as possible: those of Python take as long as the
    products. None where a stack is not cached, or a hook has to see the calls.
    """
    given: Any = module
    reached = [expert for expert in chosen if expert < experts]
    if not reached:
        return torch.zeros_like(x)
    counts = [0] * experts
    for expert in reached:
        counts[expert] += 1
    stacks: dict[str, Tensor] = {}
    for name in weights_of(given):
        matrix = matrices.get(name)
        if matrix is None:
            stored: Tensor = getattr(module, name)
            stacks[name] = stored.mT if given.is_transposed else stored
            continue
        is_stack = isinstance(matrix, FactorizedStack) and only_calls_forward(matrix)
        stack = cast(FactorizedStack, matrix).cached_stack(x, counts) if is_stack else None
        if stack is None:
            return None
        stacks[name] = stack

    def product(name: str, x: Tensor) -> Tensor:
        bias = getattr(module, f"{name}_bias")[expert] if given.has_bias else None
        return F.linear(x, stacks[name][expert], bias)

    parts = []
    for place, expert in enumerate(chosen):
        if expert < experts:
            parts.append(_expert(given, product, x) * weights[place])
    return sum(parts[1:], parts[0])


def _every_expert(
    module: nn.Module,
    matrices: Mapping[str, FactorizedMatrix],
    observers: Observers,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The same by all experts for all tokens, which reads no number of rows: an exported or traced program needs that.

    Raises:
        TdkitError: when the products are observed, as in a calibration.
    """
    if any(observers.values()):
        raise TdkitError(f"a {type(module).__name__} that is observed cannot be exported, traced or transformed")
    given: Any = module

    def product(name: str, x: Tensor) -> Tensor:  # (tokens, in) or (experts, tokens, in)
        matrix = matrices.get(name)
        if isinstance(matrix, FactorizedStack):
            y: Tensor = matrix(x, every=True)
        else:
            stored: Tensor = getattr(module, name)
            y = x @ (stored if given.is_transposed else stored.mT)
        bias: Tensor | None = getattr(module, f"{name}_bias") if given.has_bias else None
        return y if bias is None else y + bias.unsqueeze(1)

    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    outer = _expert(given, product, flat)  # (experts, tokens, in)
    chosen = top_k_index.unsqueeze(-1) == torch.arange(_experts(module, matrices), device=flat.device)
    weights = (top_k_weights.unsqueeze(-1) * chosen).sum(1)  # (tokens, experts)
    summed = (outer * weights.T.unsqueeze(-1)).sum(0)
    return summed.to(hidden_states.dtype).view(hidden_states.shape)


def _expert(given: Any, product: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
    """What an expert computes, by its products."""
    up, down = weights_of(given)
    inner = product(up, x)
    outer = product(down, given._apply_gate(inner) if _has_gate(given) else given.act_fn(inner))
    normed: Tensor = given.post_expert_norm(outer) if getattr(given, "has_post_expert_norm", False) else outer
    return normed


def _experts(module: nn.Module, matrices: Mapping[str, FactorizedMatrix]) -> int:
    up, _ = weights_of(module)
    return matrices[up].sizes[0] if up in matrices else len(getattr(module, up))


def _has_gate(module: nn.Module) -> bool:
    return getattr(module, "has_gate", True) is True  # transformers before 5.1 has gated experts only


def weights_of(module: nn.Module) -> tuple[str, str]:
    """Returns the names of the two stacks of weights of a layer of experts, the first one first."""
    return ("gate_up_proj" if _has_gate(module) else "up_proj"), "down_proj"


def _grouped(
    module: nn.Module, name: str, matrix: FactorizedMatrix | None, x: Tensor, counts: Sequence[int], bias: Tensor | None
) -> Tensor:
    if isinstance(matrix, FactorizedStack):
        y: Tensor = matrix(x, bias, counts=counts)
        return y
    stored: Tensor = getattr(module, name)
    return dense_grouped(stored.mT if cast(Any, module).is_transposed else stored, x, counts, bias)
