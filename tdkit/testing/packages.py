"""Try a plugin before it is installed."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def use_entry_points(pyproject: str | Path) -> None:
    """Make the entry points of a ``pyproject.toml`` known in this process, as an editable install would.

    The folder of the file is added to ``sys.path``. Nothing is done where the package is installed.
    """
    file = Path(pyproject)
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    try:
        distribution(project["name"])
        return
    except PackageNotFoundError:
        pass
    place = Path(tempfile.mkdtemp(prefix="tdkit-plugin-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    info = place / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    heading = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(heading, encoding="utf-8")
    lines = []
    for group, entries in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    sys.path[:0] = [str(place), str(file.parent.resolve())]
