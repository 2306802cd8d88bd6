"""Other processes of this machine that share a piece of work with this one, and its threads."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_log = logging.getLogger(__name__)


def share_of_threads(processes: int) -> int:
    """Returns how many of torch's threads each of several processes gets."""
    return max(1, torch.get_num_threads() // processes)


@contextmanager
def worker_processes(code: str, argument: str, count: int, warning: str) -> Iterator[None]:
    """A context manager that runs `count` processes, and waits for them at its end.

    Inside it this process has its `share_of_threads` too.

    Args:
        code: Python that each runs, with `argument` as ``sys.argv[1]``.
        warning: of a process that stops with an exit code, which takes the place of ``%d``.
    """
    threads = torch.get_num_threads()
    share = share_of_threads(count + 1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = [subprocess.Popen([sys.executable, "-c", code, argument], env=environment) for _ in range(count)]
    try:
        torch.set_num_threads(share)
        yield
        for process in started:  # all of the work is done
            if process.poll():
                _log.warning(warning, process.returncode)
    finally:
        torch.set_num_threads(threads)
        for process in started:
            process.terminate()
            process.wait()
