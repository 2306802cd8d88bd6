"""Packages that lie in folders of their own, where transformers does not find them when it is imported.

It fails where torchvision is found beside torch's CPU build, and imports torchao, which then logs which of its kernels
do not load.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIDE = Path(sys.prefix) / "side"
QUANTIZATION = Path(sys.prefix) / "quantization"
INSTALL = f"make {SIDE.parent.name}/side.done"


def use_torchao() -> None:
    """Make torchao importable in this process."""
    if str(QUANTIZATION) not in sys.path:
        sys.path.append(str(QUANTIZATION))


def use_side_packages() -> None:
    """Make torchvision and timm importable in this process, which must not import transformers' image models later.

    The wheel of torchvision is built for CUDA and its operators do not load beside torch's CPU build, so that the
    fake implementations that it registers for them have nothing to refer to.
    """
    register = torch.library.register_fake

    def of_known_operators(name: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(name, str) and name.startswith("torchvision::"):
            return _unchanged
        return register(name, *arguments, **options)

    sys.path.append(str(SIDE))
    torch.library.register_fake = of_known_operators
    try:
        import timm  # noqa: F401
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
