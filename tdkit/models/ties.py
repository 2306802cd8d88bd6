"""Keep transformers' own record of tied weights true after the tied layers have been rewritten."""

from __future__ import annotations

from torch import nn

from tdkit.models.hosts.base import FactorizedLayer


def follow_ties(model: nn.Module) -> None:
    """Make ``tie_weights`` of transformers models tie factors where it tied dense weights.

    transformers keeps a map of tied parameter names (``lm_head.weight`` to ``embed_tokens.weight``), on
    the class and expanded on each model, and raises when a name is no parameter any more. The map of each
    instance is replaced by the one of its factors; the class is left alone. Models of other libraries
    have no such map and are not touched.
    """
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied = getattr(module, attribute, None)
            if isinstance(tied, dict):
                followed = _follow(module, tied)
                if followed != tied:
                    setattr(module, attribute, followed)


def _follow(module: nn.Module, tied: dict[str, str]) -> dict[str, str]:
    followed = {}
    for target, source in tied.items():
        target_layer, source_layer = _layer(module, target), _layer(module, source)
        if isinstance(target_layer, FactorizedLayer) and isinstance(source_layer, FactorizedLayer):
            for name, _ in source_layer.matrix.named_parameters():
                key = target.removesuffix("weight") + f"matrix.{name}"
                followed[key] = source.removesuffix("weight") + f"matrix.{name}"
        else:
            followed[target] = source
    return followed


def _layer(module: nn.Module, parameter: str) -> nn.Module | None:
    name, _, attribute = parameter.rpartition(".")
    if attribute != "weight":
        return None
    try:
        return module.get_submodule(name)
    except AttributeError:  # a regular expression, or a layer this model lacks
        return None
