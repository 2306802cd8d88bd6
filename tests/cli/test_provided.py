"""Commands of other packages, and what is said when the package of one is missing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import tdkit as package
from tdkit.errors import MissingPluginError, TdkitError
from tdkit.support import plugins
from tests.cli.command import Result, run
from tests.packages import install_package

Tdkit = Callable[..., Result]

CODE = """
def greet(name: str, times: int = 1) -> None:
    'Say hello.'
    print("hello " * times + name)
"""


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return lambda *arguments: run(capsys, monkeypatch, *map(str, arguments))


def test_a_command_of_another_package(tdkit: Tdkit, site: Path) -> None:
    assert tdkit("greet", "you").code == 2
    install_package(site, "greeting", {"tdkit.commands": {"greet": "greeting:greet"}}, CODE)
    done = tdkit("greet", "you", "--times", 2)
    assert (done.code, done.out) == (0, "hello hello you\n")
    assert "Say hello." in tdkit("greet", "--help").out
    assert "Of the package greeting." in tdkit("--help").out
    assert "Missing argument" in tdkit("greet").err


def test_a_command_that_cannot_be_imported_breaks_no_other(tdkit: Tdkit, site: Path) -> None:
    install_package(site, "broken", {"tdkit.commands": {"break": "broken:nothing"}}, "")
    listed = tdkit("--help")
    assert listed.code == 0
    assert "Of the package broken." in listed.out
    assert "Unavailable: command 'break' of package broken" in " ".join(tdkit("break", "--help").out.split())
    done = tdkit("break", "it", "--now")
    assert done.code == 2
    assert "command 'break' of package broken (broken:nothing) failed to import" in done.err
    assert tdkit("recipes").code == 0


def test_what_a_missing_package_provides(tdkit: Tdkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugins.PROVIDED, "mend", plugins.Provided("tdkit-mend", "tdkit_mend", "Mend."))
    done = tdkit("mend", "folder")
    assert done.code == 1
    assert "mend is in the package tdkit-mend, which is not installed: pip install tdkit-mend" in done.err
    with pytest.raises(MissingPluginError, match="pip install tdkit-mend"):
        _ = package.mend  # type: ignore[attr-defined]
    assert issubclass(MissingPluginError, TdkitError)
    assert not hasattr(package, "mend")
    with pytest.raises(AttributeError, match="module 'tdkit' has no attribute 'nothing'"):
        _ = package.nothing  # type: ignore[attr-defined]


@pytest.mark.skipif(find_spec("tdkit_distill") is None, reason="tdkit-distill is not installed")
def test_what_a_package_provides() -> None:
    found: Any = package.heal
    assert found.__module__.startswith("tdkit_distill.")
