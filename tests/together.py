"""Real processes that work together through gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds: a process that waits for ever is a failure

START = """
import os, signal, sys, threading, time
import torch
from pathlib import Path
from torch import distributed
from tdkit.errors import SourceError, TdkitError
from tdkit.support.processes import failing_together, is_main_process, on_main_process, processes, shared

rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)

def raised(call):
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"

def say(*values):
    print(*values, flush=True)
"""

# Threads of gloo may abort the interpreter's teardown ("terminate called without an active exception"): skip it.
END = """
distributed.barrier()
distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def run_together(folder: Path, program: str, count: int = 2) -> list[list[str]]:
    """The lines that each of `count` processes prints; all of them are killed when one fails or takes too long."""
    code = START + textwrap.dedent(program) + END
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[str]] = []
    try:
        for rank in range(count):
            with (folder / f"out-{rank}").open("w") as out, (folder / f"err-{rank}").open("w") as err:
                arguments = [sys.executable, "-c", code, str(rank), str(count), str(folder)]
                started.append(subprocess.Popen(arguments, stdout=out, stderr=err, cwd=ROOT, env=environment))
        end = time.monotonic() + LIMIT
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            assert time.monotonic() < end, f"still running: {[process.poll() for process in started]}"
            time.sleep(0.05)
        for rank, process in enumerate(started):
            if process.poll():
                out, err = ((folder / f"{stream}-{rank}").read_text()[-2000:] for stream in ("out", "err"))
                pytest.fail(f"process {rank} ended with {process.poll()}: {err} after it had printed: {out}")
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [_said((folder / f"out-{rank}").read_text()) for rank in range(count)]


def _said(printed: str) -> list[str]:
    """The lines without those that gloo of torch 2.8 prints when it is connected."""
    return [line for line in printed.splitlines() if not line.startswith("[Gloo] Rank ")]
