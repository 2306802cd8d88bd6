"""The memory of this machine, or of the container that the process runs in."""

from __future__ import annotations

import os
from pathlib import Path

LIMIT, USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def memory() -> tuple[int | None, int | None]:
    """Returns total and available memory in bytes; None for what the system does not say."""
    total, free = _of_system()
    limit, used = _number(LIMIT), _number(USED)
    if limit is not None and (total is None or limit < total):
        total = limit
        if used is not None:
            free = limit - used if free is None else min(free, limit - used)
    return total, free


def _of_system() -> tuple[int | None, int | None]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return sizes.get("MemTotal"), sizes.get("MemAvailable")
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (AttributeError, ValueError, OSError):
        return None, None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None
