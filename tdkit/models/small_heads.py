"""Attention whose heads lost dimensions to `Shrink`, computed with heads of the size that is left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.decompositions.submatrix import SubmatrixMatrix
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.support.compatibility import only_calls_forward, version_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION = "transformers.models.llama.modeling_llama", "LlamaAttention"
IMPLEMENTATIONS = ("sdpa", "eager")


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


class _Heads(NamedTuple):
    """How a layer computes with smaller heads.

    Attributes:
        size: dimensions of a query and a key of one head.
        of_values: dimensions of a value of one head.
        groups: key-value heads.
        places: (groups * size,) int64, which of the layer's dimensions of a head the ones of each key are.
        signs: (size,) -1 for the first half and 1 for the second.
        layers: the projections, each with its matrix or None.
        stamps: what tells whether the matrices still have the same places: each with their name, themselves and their
            version.
    """

    size: int
    of_values: int
    groups: int
    places: Tensor
    signs: Tensor
    layers: tuple[tuple[nn.Module, SubmatrixMatrix | None], ...]
    stamps: tuple[tuple[SubmatrixMatrix, str, Tensor, int], ...]

    def holds(self, attention: nn.Module) -> bool:
        """Returns whether the projections are what they were."""
        modules = attention._modules
        for name, (layer, matrix) in zip(PROJECTIONS, self.layers, strict=True):
            if modules[name] is not layer or not _is_plain(layer) or _matrix_of(layer) is not matrix:
                return False
        for matrix, name, places, version in self.stamps:
            if matrix._buffers[name] is not places or version_of(places) != version:
                return False
        return True


class SmallHeads(nn.Module):
    """Mixed into the class of an attention layer, before it; see `use_small_heads`."""

    dense_class: type[nn.Module]
    _small_heads: _Heads | None

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
        if layer.config._attn_implementation not in IMPLEMENTATIONS:
            return None
        known: _Heads | None = vars(self).get("_small_heads")
        if known is None or not known.holds(self):
            known = self._small_heads = _heads_of(self)
        if known is None:
            return None
        held = _held(cache, layer.layer_idx)
        if held is not None:  # what was computed one way goes on in it
            return known if held == (known.size, known.of_values) else None
        unseen = not torch.is_grad_enabled() and all(map(only_calls_forward, _projections(self)))
        return known if unseen else None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles make the class again: it has no module to be imported from."""
        state = {name: value for name, value in vars(self).items() if name != "_small_heads"}
        return _restored, (self.dense_class,), state


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


def _projections(attention: nn.Module) -> tuple[nn.Module, ...]:
    modules = attention._modules
    return tuple(cast(nn.Module, modules[name]) for name in PROJECTIONS)


def _matrix_of(layer: nn.Module) -> SubmatrixMatrix | None:
    """Returns the matrix of a projection that lost rows or columns and nothing else; None of another one."""
    if type(layer) is not FactorizedLinear:
        return None
    matrix = layer._modules["matrix"]
    return matrix if type(matrix) is SubmatrixMatrix else None


def _is_plain(layer: nn.Module) -> bool:
    """Returns whether a projection is a dense layer, or one that lost rows or columns, as tdkit leaves it; no bias."""
    is_dense = type(layer) is nn.Linear or (type(layer) is FactorizedLinear and _matrix_of(layer) is not None)
    return is_dense and layer._parameters["bias"] is None


def _stamps(matrices: Iterable[SubmatrixMatrix]) -> tuple[tuple[SubmatrixMatrix, str, Tensor, int], ...]:
    return tuple(
        (matrix, name, places, version_of(places))
        for matrix in matrices
        for name, places in matrix._buffers.items()
        if places is not None
    )


def _heads_of(attention: Any) -> _Heads | None:
    """Returns how a layer computes with smaller heads, or None if it cannot."""
    layers = _projections(attention)
    q, k, v, o = matrices = tuple(map(_matrix_of, layers))
    if not any(matrices) or not all(map(_is_plain, layers)):
        return None
    if any(each is not None and each.is_inference() for matrix in matrices if matrix for each in matrix.buffers()):
        return None  # which have no version
    dim, shared = attention.head_dim, attention.num_key_value_groups
    groups = attention.k_proj.out_features // dim
    device = next(matrix for matrix in matrices if matrix is not None).weight.device
    every = torch.arange(groups * dim, device=device)
    if (q is None) != (k is None) or (v is None) != (o is None):
        return None
    queries = keys = _by_head(every, groups, dim)
    if q is not None and k is not None:
        if q.column_places is not None or k.column_places is not None:
            return None
        queries, keys = _by_head(q.row_places, groups * shared, dim), _by_head(k.row_places, groups, dim)
    values = outputs = _by_head(every, groups, dim)
    if v is not None and o is not None:
        if v.column_places is not None or o.row_places is not None:
            return None
        values, outputs = _by_head(v.row_places, groups, dim), _by_head(o.column_places, groups * shared, dim)
    if queries is None or keys is None or values is None or outputs is None:
        return None
    size, half = keys.shape[1], keys.shape[1] // 2
    paired = size % 2 == 0 and torch.equal(keys[:, :half] + dim // 2, keys[:, half:])
    alike = [
        torch.equal(one if matrix is None else one.repeat_interleave(shared, 0), other)
        for matrix, one, other in ((q, keys, queries), (v, values, outputs))
    ]
    if not paired or not all(alike):
        return None
    signs = torch.ones(size, device=device)
    signs[:half] = -1
    known = tuple(zip(layers, matrices, strict=True))
    return _Heads(size, values.shape[1], groups, keys.flatten(), signs, known, _stamps(filter(None, matrices)))


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
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward

    batch, length = x.shape[:2]
    size, most = heads.size, max(heads.size, heads.of_values)
    wq, wk, wv, wo = (cast(Tensor, (matrix or layer)._parameters["weight"]) for layer, matrix in heads.layers)
    cos, sin = (each.index_select(-1, heads.places) for each in position_embeddings)
    cos, sin = (each.view(*each.shape[:-1], heads.groups, 1, size) for each in (cos, sin))
    sin = sin * heads.signs.to(sin.dtype)

    def turned(y: Tensor) -> Tensor:  # (batch, length, heads * size) -> (batch, heads, length, size)
        y = y.view(batch, length, heads.groups, -1, size)
        swapped = torch.cat((y[..., size // 2 :], y[..., : size // 2]), -1)
        y = torch.addcmul(y * cos, swapped, sin) if y.dtype == cos.dtype else y * cos + swapped * sin
        return y.view(batch, length, -1, size).transpose(1, 2)

    query, key = turned(F.linear(x, wq)), turned(F.linear(x, wk))
    value = F.linear(x, wv).view(batch, length, -1, heads.of_values).transpose(1, 2)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    if size < most:  # the fast kernels want one size
        query, key = F.pad(query, (0, most - size)), F.pad(key, (0, most - size))
    elif heads.of_values < most:
        value = F.pad(value, (0, most - heads.of_values))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    dropout = attention.attention_dropout if attention.training else 0.0
    found, weights = attend(attention, query, key, value, mask, dropout=dropout, scaling=attention.scaling, **kwargs)
    found = found[..., : heads.of_values].reshape(batch, length, -1)
    return F.linear(found, wo), weights


def _held(cache: Any, layer: int) -> tuple[int, int] | None:
    """Returns the sizes of the keys and values that a cache holds for a layer; None where it holds none."""
    layers = getattr(cache, "layers", None) or ()
    keys, values = (getattr(layers[layer], name, None) if layer < len(layers) else None for name in ("keys", "values"))
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or not keys.numel():
        return None
    return keys.shape[-1], values.shape[-1]
