"""What tdkit offers by name and packages of its own project provide."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from tdkit.errors import MissingPluginError


class Provided(NamedTuple):
    """What a package provides under a name.

    Attributes:
        package: as it is installed.
        module: in which the object of that name is.
        summary: of the command of that name.
    """

    package: str
    module: str
    summary: str


PROVIDED = {
    "heal": Provided(
        "tdkit-distill",
        "tdkit_distill",
        "Train a compressed model for a short time by its dense one, and save the best weights.",
    )
}


def provided(name: str) -> Any:
    """The object of this name in the package that provides it.

    Raises:
        MissingPluginError: when the package is not installed.
    """
    check_installed(name)
    return getattr(import_module(PROVIDED[name].module), name)


def check_installed(name: str) -> None:
    """Check that the package which provides a name is installed; any other name passes.

    Raises:
        MissingPluginError: when it is not.
    """
    if name in PROVIDED and find_spec(PROVIDED[name].module) is None:
        package = PROVIDED[name].package
        raise MissingPluginError(f"{name} is in the package {package}, which is not installed: pip install {package}")
