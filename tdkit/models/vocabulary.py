"""``resize_token_embeddings`` of transformers models whose embedding or head is factorised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from tdkit.decompositions.base import assign
from tdkit.decompositions.low_rank import LowRank, LowRankMatrix
from tdkit.errors import TdkitError
from tdkit.models.hosts.base import FactorizedModule, become, transfer
from tdkit.models.hosts.embedding import FactorizedEmbedding
from tdkit.models.hosts.in_place import InPlaceLayer
from tdkit.models.sites import factorized_layers, replace_module
from tdkit.models.tied_names import follow_names

RESIZE = "resize_token_embeddings"  # the method of transformers models, which an attribute of the model hides


class VocabularyResize:
    """Resizes a model's vocabulary as transformers does it; low-rank factors get or lose rows, exactly.

    transformers resizes layers (tokens, rank) that hold the left factors, and thus draws the rows of new tokens in the
    space of the factors: with ``mean_resizing`` from the mean and covariance of the old rows, as for a dense embedding,
    and without it around zero with the configured deviation, which the right factor then scales.

    Args:
        model: a transformers model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``resize_token_embeddings`` of the model's class.

        Raises:
            TdkitError: when the factors are not those of low rank, or the tokens fewer than the rank; the model is
                unchanged.
        """
        layers = _factorized_ends(self.model)
        method = cast("Callable[..., Any]", getattr(type(self.model), RESIZE))
        tokens = kwargs.get("new_num_tokens", args[0] if args else None)
        if not layers or (not args and not kwargs):
            return method(self.model, *args, **kwargs)
        for name, layer in layers.items():
            _check(name, layer, tokens)
        plain = _left_factors(layers)
        try:
            _put(self.model, plain)
            follow_names(self.model, replaced=layers)
            method(self.model, *args, **kwargs)
            resized = {name: cast(Any, self.model.get_submodule(name)) for name in layers}
            matrices = _with_rows(layers, resized)
        finally:
            _put(self.model, layers)
            follow_names(self.model)
        for name, layer in layers.items():
            _take(cast(Any, layer), resized[name], matrices)
        return cast(Any, self.model).get_input_embeddings()


def follow_vocabulary(module: nn.Module) -> None:
    """Give a transformers model with a factorised embedding or head the method of `VocabularyResize`."""
    if not hasattr(type(module), RESIZE):
        return
    if _factorized_ends(module):
        vars(module)[RESIZE] = VocabularyResize(module)
    elif isinstance(vars(module).get(RESIZE), VocabularyResize):
        del vars(module)[RESIZE]


def _factorized_ends(model: nn.Module) -> dict[str, FactorizedModule]:
    """Returns the factorised embedding and head of a transformers model, and what shares their factors, by name."""
    matrices: set[int] = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            end = getattr(model, get)()
        except (AttributeError, NotImplementedError):  # a model without text, or without a head
            continue
        if isinstance(end, FactorizedModule):
            matrices |= {id(matrix) for matrix in end.matrices.values()}
    layers = factorized_layers(model) if matrices else ()
    return {n: layer for n, layer in layers if matrices & {id(matrix) for matrix in layer.matrices.values()}}


def _check(name: str, layer: FactorizedModule, tokens: Any) -> None:
    """Check that a layer can have so many rows.

    Raises:
        TdkitError: when it cannot.
    """
    matrix = layer.matrices["weight"]
    if isinstance(layer, InPlaceLayer) or not isinstance(matrix, LowRankMatrix):
        kind = f"{layer.replaces}, {matrix.decomposition.describe()}"
        raise TdkitError(
            f"{RESIZE}: {name} ({kind}) cannot get or lose rows: make it dense first, with "
            f"tdkit.to_dense(model, only={name!r})"
        )
    if isinstance(tokens, int) and tokens < matrix.structure.rank:
        raise TdkitError(f"{RESIZE}: {tokens} tokens are fewer than the rank {matrix.structure.rank} of {name}")


def _left_factors(layers: Mapping[str, FactorizedModule]) -> dict[str, nn.Module]:
    """Returns layers of torch (tokens, rank) with the left factors of factorised ones, tied like these."""
    plain: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for layer in layers.values():
        left = cast(LowRankMatrix, layer.matrices["weight"]).left
        if id(layer) in plain:
            continue
        if id(left) not in weights:
            weights[id(left)] = nn.Parameter(left.detach(), requires_grad=left.requires_grad)
        tokens, rank = left.shape
        made: Any
        if isinstance(layer, FactorizedEmbedding):
            made = nn.Embedding(tokens, rank, padding_idx=layer.padding_idx, device="meta")
        else:
            made = nn.Linear(rank, tokens, bias=False, device="meta")
            made.register_parameter("bias", layer.bias)
        made.weight = weights[id(left)]
        plain[id(layer)] = made
    return {name: plain[id(layer)] for name, layer in layers.items()}


def _put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        replace_module(model, name, layer)


def _with_rows(layers: Mapping[str, FactorizedModule], resized: Mapping[str, Any]) -> dict[int, LowRankMatrix]:
    """Returns matrices with the left factors that `resized` layers hold, by the ids of those that they replace."""
    found: dict[int, LowRankMatrix] = {}
    for name, layer in layers.items():
        old = cast(LowRankMatrix, layer.matrices["weight"])
        if id(old) in found:
            continue
        left = resized[name].weight
        kind = cast(LowRank, old.decomposition)
        new = kind.empty((left.shape[0], old.shape[1]), device=left.device, dtype=left.dtype)
        assign(new.left, left)
        new.left.requires_grad_(left.requires_grad)
        new.right = old.right
        transfer(old, new)
        new.dispatcher.configure(old.prefer, graphs=old.dispatcher.graphs)
        found[id(old)] = new
    return found


def _take(layer: Any, resized: Any, matrices: Mapping[int, LowRankMatrix]) -> None:
    """Give a layer, and its matrix with all of its users, the number of tokens of a resized one."""
    if id(layer.matrix) in matrices and layer.matrix.shape != matrices[id(layer.matrix)].shape:
        become(layer.matrix, matrices[id(layer.matrix)])
    if isinstance(layer, FactorizedEmbedding):
        layer.num_embeddings = layer.matrix.shape[0]
        layer.padding_idx = resized.padding_idx
        layer.zero_padding = layer.zero_padding and layer.padding_idx is not None
        layer.matrix.lay_out_for_rows()
    else:
        layer.out_features = layer.matrix.shape[0]
        layer.bias = resized.bias
