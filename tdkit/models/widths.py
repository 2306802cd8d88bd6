"""The width in the config of a transformers model whose groups all keep the same number of units."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tdkit.models.attributes import WIDTHS, configs_of
from tdkit.models.groups.group import Group
from tdkit.models.hosts.base import DENSE_SHAPE
from tdkit.models.huggingface import is_transformers


def follow_widths(model: nn.Module, groups: Sequence[Group], units: int) -> bool:
    """Set the number of units of `groups` in the config of a transformers model if its class then has these layers.

    The config is tried on the meta device: a model built from it must have layers of the sizes that this one has. The
    saved folder is then that of an ordinary model, and its layers no longer remember that they were larger.

    Args:
        groups: groups, as they were before they got `units` units each.

    Returns:
        Whether the config describes the smaller layers.
    """
    if not groups or not is_transformers(model):
        return False
    before = groups[0].units
    tried = copy.deepcopy(model.config)
    changed = [_set(config, name, before, units) for config in configs_of(tried) for name in WIDTHS]
    if not any(changed) or not _fits(model, tried):
        return False
    for config in configs_of(model.config):
        for name in WIDTHS:
            _set(config, name, before, units)
    for group in groups:
        for site in group.sites:
            vars(site.users[0].module).pop(DENSE_SHAPE, None)
            parent = model.get_submodule(site.users[0].layer.rpartition(".")[0])
            for name in WIDTHS:
                if vars(parent).get(name) == before:
                    setattr(parent, name, units)
    return True


def _set(config: Any, name: str, before: int, units: int) -> bool:
    """Set an entry that holds the number of units, or leaves it to the class (None); returns whether there is one."""
    if name not in vars(config) or vars(config)[name] not in (before, None):
        return False
    setattr(config, name, units)
    return True


def _fits(model: nn.Module, config: Any) -> bool:
    try:
        with torch.device("meta"):
            built = type(model)(config)
    except Exception:  # of any class of transformers
        return False
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    return all(own[name] == shape for name, shape in wanted.items() if name in own)
