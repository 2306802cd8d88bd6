"""Adapters, such as LoRA, that fine-tuning adds to a model: their weights are small already, and trained apart."""

from __future__ import annotations

from torch import nn

from tdkit.models.sites import Site

PREFIXES = (  # of the modules and parameters of adapters in peft, and in models written after its papers
    "boft_",
    "delora_",
    "fourierft_",
    "gralora_",
    "hada_",
    "hira_",
    "hra_",
    "ia3_",
    "ln_tuning_",
    "lokr_",
    "lora_",
    "oft_",
    "randlora_",
    "trainable_tokens_",
    "vblora_",
    "vera_",
    "waveft_",
)


def adapter_of(site: Site) -> str | None:
    """Returns the part of a weight's name that marks it as one of an adapter, such as 'lora_A', or None.

    A layer of peft lists the names of its adapter's modules in ``adapter_layer_names``. Elsewhere the part is
    recognised by a prefix of peft's.
    """
    for user in site.users:
        parent: object = user.model
        parts = user.layer.split(".") if user.layer else []
        for part in (*parts, user.weight):
            if part in getattr(parent, "adapter_layer_names", ()) or part.startswith(PREFIXES):
                return part
            parent = getattr(parent, part, None) if isinstance(parent, nn.Module) else None
    return None
