"""Experiment trackers by the names that accelerate gives them, such as tensorboard and wandb."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tdkit.errors import MissingDependencyError, OptionError, did_you_mean

PACKAGES = {"tensorboard": "tensorboardX"}  # of trackers that are not called like theirs


def check_trackers(names: Sequence[str], folder: Path | None) -> None:
    """Check that trackers exist and are installed, and have a folder if they write files.

    Raises:
        OptionError: when there is no such tracker, its package is not installed, or it needs a folder.
        MissingDependencyError: when accelerate is not installed.
    """
    if not names:
        return
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError as error:
        raise MissingDependencyError(f"trackers are those of accelerate: pip install accelerate ({error})") from error
    known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name == "all":
            continue
        if name not in known:
            hint = did_you_mean(name, known) or f". accelerate knows {', '.join(sorted(known))}"
            raise OptionError(f"trackers: there is no tracker '{name}'{hint}")
        if name not in installed:
            package = PACKAGES.get(name, name.replace("_", "-"))
            raise OptionError(f"trackers: the package of '{name}' is not installed: pip install {package}")
        if folder is None and known[name].requires_logging_directory:
            raise OptionError(f"trackers: '{name}' writes into the run's folder, and there is none: pass folder=")
