"""Data files inside installed packages."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from tdkit.errors import MissingDependencyError, SourceError


def package_file(package: str, file: str, install: str) -> Path:
    """Returns the path of a data file in an installed package, found without importing the package.

    Args:
        package: the name of the distribution.
        file: the name of the file, without folders.
        install: the command that installs the package, for the error message.

    Raises:
        MissingDependencyError: when the package is not installed.
        SourceError: when the package has no such file.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(f"this needs the package {package}: {install}") from None
    for entry in files:
        if entry.name == file:
            return Path(str(entry.locate()))
    raise SourceError(f"the installed package {package} holds no {file}: {install} --force-reinstall")
