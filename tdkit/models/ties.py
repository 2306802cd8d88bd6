"""Update what transformers models know of their layers after some have been replaced."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from tdkit.models.tied_names import follow_names
from tdkit.models.vocabulary import follow_vocabulary


def follow_ties(model: nn.Module, replaced: Collection[str] = ()) -> None:
    """Make ``tie_weights`` and ``resize_token_embeddings`` of transformers models work on the layers as they are now.

    Models of other libraries are not changed.

    Args:
        model: a model some of whose layers have been replaced.
        replaced: the names of layers that were factorised until now and are not any more.
    """
    follow_names(model, replaced)
    for module in model.modules():
        follow_vocabulary(module)
