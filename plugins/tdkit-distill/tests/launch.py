"""Processes that a test starts: they and their children end with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def started(script: str, *arguments: object, launcher: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A script beside this file, run by this interpreter on one thread; killed with its children on leaving."""
    command = [sys.executable, *launcher, str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):  # nothing of the group is left
                os.killpg(process.pid, signal.SIGKILL)
