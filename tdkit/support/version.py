"""The version of tdkit, for files that must not be mixed between versions, and those of other packages."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

VERSION = "0.1.0"


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
