"""Packages that the tests install: what a third party would write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest


def install_package(folder: Path, name: str, entries: Mapping[str, Mapping[str, str]], code: str) -> None:
    """A real, if minimal, installed package: one module, and its metadata with entry points by group."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = []
    for group, values in entries.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in values.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path to install packages in."""
    folder = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(str(folder))
    return folder
