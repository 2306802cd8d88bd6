"""The figures of a sweep's points, given to experiment trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdkit.support.compatibility import reset_accelerate_state
from tdkit.support.trackers import check_trackers

PROJECT = "tdkit-sweep"


class Tracking:
    """Trackers by accelerate's names; nothing without names.

    Args:
        names: such as "tensorboard".
        folder: where trackers that write files write them.

    Raises:
        OptionError: when a tracker is unknown or not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path | None) -> None:
        self._names = [names] if isinstance(names, str) else list(names)
        self._folder = folder
        self._accelerator: Any = None
        check_trackers(self._names, folder)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Give the numbers of a point to the trackers, which are started by the first."""
        if not self._names:
            return
        if self._accelerator is None:
            from accelerate import Accelerator  # slow to import

            reset_accelerate_state()
            place = None if self._folder is None else str(self._folder)
            self._accelerator = Accelerator(cpu=True, log_with=self._names, project_dir=place)
            self._accelerator.init_trackers(PROJECT)
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        self._accelerator.log(numbers, step=step)

    def close(self) -> None:
        """End the trackers."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None
