"""``tdkit new-plugin`` writes packages whose tests pass at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.cli.command import Result, run

Tdkit = Callable[..., Result]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tdkit:
    monkeypatch.chdir(tmp_path)
    return partial(run, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("name", "options", "module", "own"),
    [("tdkit-two-factors", (), "tdkit_two_factors", "two_factors"), ("stripes", ("--host",), "stripes", "stripes")],
)
def test_what_is_written_passes_its_own_tests(
    tdkit: Tdkit, tmp_path: Path, name: str, options: tuple[str, ...], module: str, own: str
) -> None:
    written = tdkit("new-plugin", name, *options)
    assert written.code == 0, written.err
    assert f"wrote {name}; try it: cd {name} && python -m pytest" in written.err
    files = sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file())
    code = [f"{module}/__init__.py", f"{module}/{own}.py", "tests/conftest.py", f"tests/test_{own}.py"]
    assert files == sorted(["README.md", "pyproject.toml", *code])
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    done = subprocess.run(call, cwd=tmp_path / name, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_what_is_written_is_formatted(tdkit: Tdkit, tmp_path: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    for name, options in {"tdkit-two-factors": (), "stripes": ("--host",)}.items():
        tdkit("new-plugin", name, *options)
        for check in (("format", "--check"), ("check", "--select", "E,F,W,I,N,UP,B")):
            call = [ruff, *check, "--isolated", "--no-cache", "--line-length", "120", "."]
            done = subprocess.run(call, cwd=tmp_path / name, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("My Package",), "'My Package' is no name for a package"),
        (("tdkit-import",), "'import' cannot be the name of a module"),
        (("json",), "there is a package 'json' already: give another name, such as tdkit-json"),
        (("tdkit-low-rank",), "there is a decomposition 'low_rank' already"),
        (("tdkit-embedding", "--host"), "there is a host 'embedding' already"),
        (("tdkit-fine", "--out", "."), ". exists: give another folder with --out"),
    ],
)
def test_names_that_cannot_be_are_told(tdkit: Tdkit, tmp_path: Path, call: tuple[str, ...], message: str) -> None:
    done = tdkit("new-plugin", *call)
    assert (done.code, message in done.err) == (2, True), done.err
    assert list(tmp_path.iterdir()) == []
