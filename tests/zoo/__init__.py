"""The zoo: small random models of many architectures, one line each, that `tests.test_zoo` compresses."""

from __future__ import annotations

from tests.zoo.architecture import Architecture
from tests.zoo.torch_layers import TORCH
from tests.zoo.transformers_models import TRANSFORMERS
from tests.zoo.vision_models import timm_models, torchvision_models

SIDE_LIBRARIES = {"torchvision": torchvision_models, "timm": timm_models}


def architectures(library: str | None = None) -> list[Architecture]:
    """The models of one library, which lies in the side folder, or those of torch and transformers."""
    return SIDE_LIBRARIES[library]() if library else [*TORCH, *TRANSFORMERS]
