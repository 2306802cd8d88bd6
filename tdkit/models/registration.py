"""Tell transformers of models with factors, without importing it: see `tdkit.models.quantizer`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tdkit.support.imports import when_imported

if TYPE_CHECKING:
    from torch import nn


def register() -> None:
    """Register the reader of compressed models with transformers, at once or when it is imported."""
    when_imported("transformers.quantizers.auto", _register)


def _register() -> None:
    import tdkit.models.quantizer  # noqa: F401, registers when it is loaded


def attach(model: nn.Module) -> None:
    """Make ``save_pretrained`` of transformers models with factors, `model` itself or parts of it, write a description.

    Models of other libraries are not changed.
    """
    package: Any = sys.modules.get("transformers.modeling_utils")
    if package is None:
        return
    from tdkit.models.quantizer import quantizer_of
    from tdkit.models.sites import is_compressed

    for module in model.modules():
        if isinstance(module, package.PreTrainedModel) and is_compressed(module):
            vars(module)["hf_quantizer"] = quantizer_of(module)
