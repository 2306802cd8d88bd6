"""What is built of the repository: twice the same, and whole."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("project", [".", "plugins/tdkit-distill"])
def test_wheels_are_reproducible_and_whole(project: str, tmp_path: Path) -> None:
    """Needs hatchling, which pip fetches."""
    digests = []
    for turn in ("first", "second"):
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--quiet",
            "--wheel-dir",
            str(tmp_path / turn),
            project,
        ]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}, check=True)
        (wheel,) = (tmp_path / turn).iterdir()
        digests.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    package = "tdkit" if project == "." else "tdkit_distill"
    packed = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        path.relative_to(ROOT / project).as_posix()
        for path in (ROOT / project / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert ours <= packed
    assert not any(name.startswith("tests/") for name in packed)
