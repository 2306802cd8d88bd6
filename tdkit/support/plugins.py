"""What tdkit offers by name and packages of its own project provide."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tdkit.errors import MissingPluginError

PROVIDED = {"heal": ("tdkit-distill", "tdkit_distill")}  # name: package, module


def provided(name: str) -> Any:
    """The object of this name in the package that provides it.

    Raises:
        MissingPluginError: when the package is not installed.
    """
    check_installed(name)
    return getattr(import_module(PROVIDED[name][1]), name)


def check_installed(name: str) -> None:
    """Check that the package which provides a name is installed; any other name passes.

    Raises:
        MissingPluginError: when it is not.
    """
    if name in PROVIDED and find_spec(PROVIDED[name][1]) is None:
        package = PROVIDED[name][0]
        raise MissingPluginError(f"{name} is in the package {package}, which is not installed: pip install {package}")
