"""What a transformers model knows of its layers beside their tensors, to be put back when a change of it fails."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from tdkit.models.vocabulary import RESIZE

TIES = ("_tied_weights_keys", "all_tied_weights_keys")

WIDTHS = (  # entries of configs, and attributes of modules, that hold the number of hidden units of an MLP
    *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "d_inner"),
    *("hidden_dim", "ffn_hidden_size", "feed_forward_hidden_size"),
)

KEPT = (*TIES, RESIZE, "hf_quantizer", *WIDTHS)


class Attributes:
    """The attributes of the modules of a model, and the entries of its configs, as they are now.

    Args:
        model: any model; those that are not of transformers have none of them as a rule.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(weakref.ref(module), _kept(module)) for module in model.modules()]  # layers may be freed
        configs = {
            id(config): config for module in model.modules() for config in configs_of(vars(module).get("config"))
        }
        self._configs = [(config, dict(vars(config))) for config in configs.values()]

    def restore(self) -> None:
        """Give all of them back what they had."""
        for reference, known in self._modules:
            module = reference()
            if module is not None:
                for name in KEPT:
                    vars(module).pop(name, None)
                vars(module).update(known)
        for config, known in self._configs:
            vars(config).clear()
            vars(config).update(known)


def _kept(module: nn.Module) -> dict[str, Any]:
    own = vars(module)
    return {name: own[name] for name in KEPT if name in own}


def configs_of(config: Any) -> Iterator[Any]:
    """Iterate over a config of transformers and those of the parts of a model inside it; none for another object."""
    if not hasattr(type(config), "to_diff_dict"):
        return
    yield config
    for value in list(vars(config).values()):
        yield from configs_of(value)
