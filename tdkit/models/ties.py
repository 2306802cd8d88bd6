"""Update transformers' map of tied weights after the tied layers have been replaced."""

from __future__ import annotations

from torch import nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.models.hosts.base import FactorizedModule


def follow_ties(model: nn.Module) -> None:
    """Make ``tie_weights`` of transformers models tie the factors in place of the dense weights.

    transformers keeps a map of tied parameter names (``lm_head.weight`` to ``embed_tokens.weight``) on
    the class, and an expanded one on each model, and raises when such a parameter no longer exists. The map of each
    instance is replaced by one of its factors; the class is not changed. Models of other libraries
    have no such map and are not changed.
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
        if isinstance(target_layer, FactorizedModule) and isinstance(source_layer, FactorizedModule):
            weight = target.rpartition(".")[2]
            place = _place(source_layer, source_layer.matrices[weight])
            for name, _ in source_layer.matrices[weight].named_parameters():
                key = target.removesuffix(weight) + f"{place}.{name}"
                followed[key] = source.removesuffix(weight) + f"{place}.{name}"
        else:
            followed[target] = source
    return followed


def _place(layer: FactorizedModule, matrix: FactorizedMatrix) -> str:
    """Returns the name of a factorised matrix inside its layer."""
    found: str = next(name for name, module in layer.named_modules() if module is matrix)
    return found


def _layer(module: nn.Module, parameter: str) -> nn.Module | None:
    """Returns the factorised layer of a weight, or None if there is none (the name may be a regular expression)."""
    name, _, attribute = parameter.rpartition(".")
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        return None
    return layer if isinstance(layer, FactorizedModule) and attribute in layer.matrices else None
