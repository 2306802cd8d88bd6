"""What waits for an import runs once, right after it, and leaves no trace."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tdkit.support.imports import when_imported


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "tdkit_waits_for_this"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("from tdkit_waits_for_this.inner import VALUE\n")
    (tmp_path / name / "inner.py").write_text("VALUE = 3\n")
    (tmp_path / name / "broken.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name  # type: ignore[misc]
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def test_a_function_runs_right_after_the_import(package: str) -> None:
    seen: list[object] = []
    before = list(sys.meta_path)
    when_imported(f"{package}.inner", lambda: seen.append(sys.modules[f"{package}.inner"].VALUE))
    assert seen == []
    assert package not in sys.modules
    module = importlib.import_module(package)
    assert seen == [3]
    assert sys.meta_path == before
    assert type(sys.modules[f"{package}.inner"].__spec__.loader).__name__ == "SourceFileLoader"  # type: ignore[union-attr]
    assert module.VALUE == 3
    when_imported(f"{package}.inner", lambda: seen.append("at once"))
    assert seen == [3, "at once"]


def test_a_module_that_fails_is_waited_for_again(package: str, tmp_path: Path) -> None:
    seen: list[str] = []
    when_imported(f"{package}.broken", lambda: seen.append("called"))
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module(f"{package}.broken")
    assert seen == []
    (tmp_path / package / "broken.py").write_text("VALUE = 'mended, and of another length'\n")
    importlib.import_module(f"{package}.broken")
    assert seen == ["called"]


def test_a_missing_module_stays_missing(package: str) -> None:
    before = list(sys.meta_path)
    when_imported(f"{package}.nowhere", lambda: None)
    with pytest.raises(ModuleNotFoundError, match=rf"No module named '{package}.nowhere'"):
        importlib.import_module(f"{package}.nowhere")
    sys.meta_path[:] = before
