"""Attention whose heads lost dimensions to `Shrink`, computed with heads of the size that is left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.decompositions.submatrix import SubmatrixMatrix
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.products.cached_tensor import CachedTensor
from tdkit.support.compatibility import only_calls_forward

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION = "transformers.models.llama.modeling_llama", "LlamaAttention"
IMPLEMENTATIONS = ("sdpa", "eager")
PLACES = "_places"  # an attribute of a layer that computes with smaller heads: a `CachedTensor`


def use_small_heads(model: nn.Module) -> None:
    """Let the attention layers of a model compute with smaller heads where all of a layer lost equally many dimensions.

    For LLaMA's attention of transformers. Without that, queries, keys and values are computed of the size left, and
    spread with zeros between to the size that the layer's code expects; a cache of keys and values holds these too.
    Layers are changed in place, and stay instances of their class. Calls with gradients, under ``torch.compile``, with
    a static cache, with hooks on the projections, or once these are replaced, run the layer's own code.
    """
    for module in model.modules():
        if (type(module).__module__, type(module).__name__) == ATTENTION and _heads_of(module) is not None:
            module.__class__ = _with_small_heads(type(module))
            vars(module)[PLACES] = CachedTensor()


class _Heads(NamedTuple):
    """How a call of a layer computes with smaller heads.

    Attributes:
        places: (groups, size) int64, which of the dimensions of a head the keys of each key-value head still have.
        weights: of queries, keys, values and the output, without what was removed.
        seen: a hook sees the calls of a projection.
    """

    places: Tensor
    weights: Sequence[Tensor]
    seen: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """Dimensions of a query and a key, and of a value, of one head."""
        groups, size = self.places.shape
        return size, self.weights[2].shape[0] // groups


class SmallHeads(nn.Module):
    """Mixed into the class of an attention layer, before it; see `use_small_heads`."""

    dense_class: type[nn.Module]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        heads = None if position_embeddings is None else self._heads(past_key_values)
        if heads is None or position_embeddings is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        return _attend(self, heads, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs)

    def _heads(self, cache: Any) -> _Heads | None:
        """Returns how to compute a call; None for the layer's own code, see `use_small_heads`."""
        layer: Any = self
        if torch.compiler.is_compiling() or getattr(cache, "is_compileable", False):
            return None
        known = _heads_of(layer)
        if known is None or layer.config._attn_implementation not in IMPLEMENTATIONS:
            return None
        held = None if cache is None else _held(cache, layer.layer_idx)
        if held is not None:  # what was computed one way goes on in it
            return known if held == known.sizes else None
        return None if known.seen or torch.is_grad_enabled() else known

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles make the class again: it has no module to be imported from."""
        return _restored, (self.dense_class,), vars(self)


_classes: dict[type[nn.Module], type[SmallHeads]] = {}


def _with_small_heads(dense_class: type[nn.Module]) -> type[SmallHeads]:
    """Returns a subclass that computes with smaller heads, of the same name and module."""
    if dense_class not in _classes:
        own = {"dense_class": dense_class, "__module__": dense_class.__module__}
        _classes[dense_class] = type(dense_class.__name__, (SmallHeads, dense_class), own)
    return _classes[dense_class]


def _restored(dense_class: type[nn.Module]) -> SmallHeads:
    kind = _with_small_heads(dense_class)
    return kind.__new__(kind)


def _heads_of(attention: nn.Module) -> _Heads | None:
    """Returns how a layer computes with smaller heads; None if it cannot, or its projections are others now.

    The projections of that are dense layers, or lost rows or columns, as tdkit leaves them, without bias. Asked in each
    call, of a layer whose weights have just passed through the CPU's caches: so this is one loop.
    """
    modules = attention._modules
    sources: list[Tensor] = []
    weights: list[Tensor] = []
    seen = False
    for name in PROJECTIONS:
        layer: Any = modules[name]
        parameters = layer._parameters
        if parameters.get("bias") is not None:
            return None
        seen = seen or not only_calls_forward(layer)
        if type(layer) is FactorizedLinear:
            matrix = layer._modules["matrix"]
            if type(matrix) is not SubmatrixMatrix:
                return None
            parameters = matrix._parameters
            for places in matrix._buffers.values():
                if places is not None:
                    sources.append(places)
        elif type(layer) is not nn.Linear:
            return None
        weights.append(parameters["weight"])
    if not sources:
        return None
    cached: CachedTensor = attention.__dict__.get(PLACES) or CachedTensor()
    found = cached.get(sources, torch.int64, lambda: _places_of(attention, _matrices(attention)))
    return _Heads(found, weights, seen) if found is not None and found.numel() else None


def _matrices(attention: nn.Module) -> list[SubmatrixMatrix | None]:
    """Returns the matrices of the projections; None of dense ones."""
    return [cast(Any, attention._modules[name])._modules.get("matrix") for name in PROJECTIONS]


def _places_of(attention: Any, matrices: Sequence[SubmatrixMatrix | None]) -> Tensor:
    """Returns which dimensions the keys of each head still have, (groups, size) int64; empty if heads differ."""
    q, k, v, o = matrices
    dim, shared = attention.head_dim, attention.num_key_value_groups
    groups = attention.k_proj.out_features // dim
    device = next(matrix for matrix in matrices if matrix is not None).weight.device
    none = torch.empty(0, dtype=torch.int64, device=device)
    if (q is None) != (k is None) or (v is None) != (o is None):
        return none
    every = torch.arange(groups * dim, device=device)
    queries = keys = _by_head(every, groups, dim)
    if q is not None and k is not None:
        if q.column_places is not None or k.column_places is not None:
            return none
        queries, keys = _by_head(q.row_places, groups * shared, dim), _by_head(k.row_places, groups, dim)
    values = outputs = _by_head(every, groups, dim)
    if v is not None and o is not None:
        if v.column_places is not None or o.row_places is not None:
            return none
        values, outputs = _by_head(v.row_places, groups, dim), _by_head(o.column_places, groups * shared, dim)
    if queries is None or keys is None or values is None or outputs is None:
        return none
    half = keys.shape[1] // 2
    paired = keys.shape[1] % 2 == 0 and torch.equal(keys[:, :half] + dim // 2, keys[:, half:])
    alike = [
        torch.equal(one if matrix is None else one.repeat_interleave(shared, 0), other)
        for matrix, one, other in ((q, keys, queries), (v, values, outputs))
    ]
    return keys if paired and all(alike) else none


def _by_head(places: Tensor | None, heads: int, dim: int) -> Tensor | None:
    """Returns which dimensions of each head are left, (heads, size) int64; None if not equally many are."""
    if places is None:
        return None
    counts = torch.bincount(places // dim, minlength=heads)
    if len(counts) != heads or not bool((counts == counts[0]).all()):
        return None
    return (places % dim).reshape(heads, -1)


def _attend(
    attention: Any,
    heads: _Heads,
    x: Tensor,  # (batch, length, in)
    position_embeddings: tuple[Tensor, Tensor],  # each (batch, length, head_dim)
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What ``LlamaAttention.forward`` computes, of the dimensions that are left."""
    code: Any = sys.modules[ATTENTION[0]]
    batch, length = x.shape[:2]
    groups, (size, of_values) = len(heads.places), heads.sizes
    most = max(size, of_values)
    wq, wk, wv, wo = heads.weights
    places = heads.places.flatten()
    cos, sin = (each.index_select(-1, places) for each in position_embeddings)
    cos, sin = (each.view(*each.shape[:-1], groups, 1, size) for each in (cos, sin))
    sin[..., : size // 2].neg_()  # of a copy

    def turned(y: Tensor) -> Tensor:  # (batch, length, heads * size) -> (batch, heads, length, size)
        y = y.view(batch, length, groups, -1, size)
        swapped = torch.cat((y[..., size // 2 :], y[..., : size // 2]), -1)
        y = torch.addcmul(y * cos, swapped, sin) if y.dtype == cos.dtype else y * cos + swapped * sin
        return y.view(batch, length, -1, size).transpose(1, 2)

    query, key = turned(F.linear(x, wq)), turned(F.linear(x, wk))
    value = F.linear(x, wv).view(batch, length, -1, of_values).transpose(1, 2)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    if size < most:  # the fast kernels want one size
        query, key = F.pad(query, (0, most - size)), F.pad(key, (0, most - size))
    elif of_values < most:
        value = F.pad(value, (0, most - of_values))
    implementation = attention.config._attn_implementation
    attend = code.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, code.eager_attention_forward)
    dropout = attention.attention_dropout if attention.training else 0.0
    found, weights = attend(attention, query, key, value, mask, dropout=dropout, scaling=attention.scaling, **kwargs)
    found = found[..., :of_values].reshape(batch, length, -1)
    return F.linear(found, wo), weights


def _held(cache: Any, layer: int) -> tuple[int, int] | None:
    """Returns the sizes of the keys and values that a cache holds for a layer; None where it holds none."""
    layers = getattr(cache, "layers", None) or ()
    keys, values = (getattr(layers[layer], name, None) if layer < len(layers) else None for name in ("keys", "values"))
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or not keys.numel():
        return None
    return keys.shape[-1], values.shape[-1]
