"""Data files inside installed packages."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from tdkit.errors import MissingDependencyError, SourceError


def package_file(package: str, file: str, install: str) -> Path:
    """A data file inside an installed package, found without importing the package.

    Raises:
        MissingDependencyError: when the package is not installed.
        SourceError: when it holds no such file.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(f"this needs the package {package}: {install}") from None
    for entry in files:
        if entry.name == file:
            return Path(str(entry.locate()))
    raise SourceError(f"the installed package {package} holds no {file}: {install} --force-reinstall")
