"""The names of tied parameters that transformers models keep."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from tdkit.models.hosts.base import FactorizedModule
from tdkit.models.sites import factorized_groups


def follow_names(model: nn.Module, replaced: Collection[str] = ()) -> None:
    """Make ``tie_weights`` of transformers models tie the parameters that took the place of tied ones.

    transformers keeps a map of tied parameter names (``lm_head.weight`` to ``embed_tokens.weight``) on
    the class, and an expanded one on each model, and raises when such a parameter no longer exists. The map of each
    instance is replaced by one of the factors, or of what replaced them; the class is not changed. Models of other
    libraries have no such map and are not changed.

    Args:
        model: the model.
        replaced: the names of layers that were factorised until now and are not any more.
    """
    for prefix, module in model.named_modules():
        inside = {name.removeprefix(f"{prefix}.") for name in replaced if not prefix or name.startswith(f"{prefix}.")}
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied = getattr(module, attribute, None)
            if isinstance(tied, dict):
                followed = _follow(module, tied, inside)
                if followed != tied:
                    setattr(module, attribute, followed)
    known = getattr(model, "all_tied_weights_keys", None)
    if isinstance(known, dict):
        model.all_tied_weights_keys = {**_held_once(model), **known}  # type: ignore[assignment]


def _held_once(model: nn.Module) -> dict[str, str]:
    """Returns the names of factors that several layers hold, whatever the model's config says of its embeddings.

    Other libraries set ``tie_word_embeddings=False`` when they find the dense weights, which are computed on each
    access, at different addresses; ``from_pretrained`` would then take factors that the file holds once as missing.
    """
    found: dict[str, str] = {}
    for _, (first, *others) in factorized_groups(model):
        for other in others:
            if other.module is not first.module:
                found |= _shared(model, other.layer, first.layer)
    return found


def _follow(module: nn.Module, tied: dict[str, str], replaced: Collection[str]) -> dict[str, str]:
    followed = {}
    for target, source in tied.items():
        changed, other = _layer(module, target, replaced), _layer(module, source, replaced)
        if changed is None or other is None:
            followed[target] = source
        else:
            followed |= _shared(module, changed, other)
    return followed


def _layer(module: nn.Module, parameter: str, replaced: Collection[str]) -> str | None:
    """Returns the name of the layer that holds a parameter in another form now.

    It is None if there is none; the name of the parameter may also be a regular expression.
    """
    name, _, attribute = parameter.rpartition(".")
    within = next((layer for layer in replaced if parameter.startswith(f"{layer}.")), None)
    if within is not None:
        return within
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        return None
    return name if isinstance(layer, FactorizedModule) and attribute in layer.matrices else None


def _shared(module: nn.Module, target: str, source: str) -> dict[str, str]:
    """Returns the names in one layer of the parameters that another one holds too, with the names there."""
    sources = {id(parameter): name for name, parameter in module.get_submodule(source).named_parameters()}
    found = module.get_submodule(target).named_parameters()
    return {f"{target}.{name}": f"{source}.{sources[id(p)]}" for name, p in found if id(p) in sources}
