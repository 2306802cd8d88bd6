"""``tdkit doctor`` names what is here, what fails and why, and what is missing."""

from __future__ import annotations

import json
import platform
import tomllib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tdkit.cli import doctor
from tests.cli.command import Result, run
from tests.packages import install_package

Tdkit = Callable[..., Result]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return partial(run, capsys, monkeypatch)


def test_versions_and_machine(tdkit: Tdkit) -> None:
    found = json.loads(tdkit("doctor", "--json").out)
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["python"] == platform.python_version()
    assert found["machine"]["threads of torch"] == torch.get_num_threads()
    assert found["machine"]["memory"].endswith("GiB")
    if not torch.cuda.is_available():
        assert found["machine"]["cuda"].startswith("none")


def test_plugins_that_fail_are_named_with_the_reason(tdkit: Tdkit, site: Path) -> None:
    entries = {
        "tdkit.decompositions": {"fine": "half_broken:Fine", "nameless": "half_broken:Nameless"},
        "tdkit.losses": {"absent": "half_broken:absent"},
    }
    code = """
from tdkit import LowRank
class Fine(LowRank):
    name = "fine"
class Nameless(LowRank):
    name = "another"
"""
    install_package(site, "half-broken", entries, code)
    done = tdkit("doctor", "--json")
    assert done.code == 1
    errors = {each["name"]: each["error"] for each in json.loads(done.out)["plugins"]}
    assert errors["fine"] == ""
    assert "its `name` is 'another'" in errors["nameless"]
    assert "AttributeError" in errors["absent"]
    table = tdkit("doctor")
    assert table.code == 1
    assert "works" in table.out
    assert "half-broken 1.0" in table.out


METADATA = """Metadata-Version: 2.1
Name: tdkit
Version: 9.0
Provides-Extra: hf
Provides-Extra: elsewhere
Requires-Dist: torch
Requires-Dist: no-such-package>=1; extra == 'hf'
Requires-Dist: numpy>=1; extra == 'hf'
Requires-Dist: no-such-driver; platform_system == 'Nowhere' and extra == 'elsewhere'
"""


def test_extras_name_what_is_missing_and_what_it_brings(tdkit: Tdkit, site: Path) -> None:
    info = site / "tdkit-9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA, encoding="utf-8")
    extras = {each["name"]: each for each in json.loads(tdkit("doctor", "--json").out)["extras"]}
    assert extras["hf"]["missing"] == ["no-such-package"]
    assert extras["hf"]["brings"] == doctor.BRINGS["hf"]
    assert extras["elsewhere"]["missing"] == []
    assert "lacks no-such-package" in tdkit("doctor").out


def test_every_extra_has_a_description() -> None:
    form = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(form["project"]["optional-dependencies"]) <= set(doctor.BRINGS)
