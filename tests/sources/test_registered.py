"""Models and texts that packages add by entry points."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tdkit.errors import RegistryError, SourceError
from tdkit.sources import load_model, load_texts, model_sources, text_sources
from tests.packages import install_package

CODE = """
import torch
from tdkit.errors import SourceError
from tdkit.sources import Source

def model(part, *, dtype):
    if part not in (None, "wide"):
        raise SourceError(f"no model 'toy:{part}'. Known: toy, toy:wide")
    return Source("toy", torch.nn.Linear(3, 7 if part else 2, dtype=dtype), None)

def text(part):
    return ["first", f"part {part}"]

def fails(part, dtype=None):
    return 1 // 0

def wrong(part, dtype=None):
    return "a string"

def numbers(part):
    return ["a", 1]

value = 3
"""


@pytest.fixture
def toys(site: Path) -> Path:
    sys.modules.pop("toy_sources", None)
    entries = {
        "tdkit.models": {name: f"toy_sources:{name}" for name in ("fails", "wrong", "value", "missing", "twice")},
        "tdkit.texts": {name: f"toy_sources:{name}" for name in ("fails", "wrong", "value", "numbers")},
    }
    entries["tdkit.models"]["toy"], entries["tdkit.texts"]["toy"] = "toy_sources:model", "toy_sources:text"
    install_package(site, "toy-sources", entries, CODE)
    return site


def test_the_built_ins_are_registered_like_any_other() -> None:
    assert model_sources.origins()["smollm2"] == ["tdkit"]
    assert text_sources.origins()["sotu"] == ["tdkit"]


def test_a_package_adds_a_model_and_a_text(toys: Path) -> None:
    source = load_model("toy", dtype=torch.float64)
    assert source.model.weight.shape == (2, 3)
    assert source.model.weight.dtype == torch.float64
    assert not source.model.training
    assert load_model("toy:wide").model.weight.shape == (7, 3)
    assert load_texts("toy") == ["first", "part None"]
    assert load_texts("toy:a:b") == ["first", "part a:b"]
    with pytest.raises(SourceError, match=r"^no model 'toy:tall'\. Known: toy, toy:wide$"):
        load_model("toy:tall")


def test_what_exists_here_comes_before_what_is_registered(
    toys: Path, gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy").mkdir()
    assert load_model("toy").model.weight.shape == (2, 3)  # a folder without a model is none
    Path("toy").rmdir()
    Path("toy").symlink_to(gpt2_folder)
    assert type(load_model("toy").model).__name__ == "GPT2LMHeadModel"
    Path("toy").unlink()
    Path("toy").write_text("mine")
    assert load_texts("toy") == ["mine"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails:x", "model source 'fails' of package toy-sources failed on 'fails:x': ZeroDivisionError"),
        (
            "wrong",
            "model source 'wrong' of package toy-sources returned a builtins.str for 'wrong' instead of a tdkit.s",
        ),
    ],
)
def test_a_model_source_that_fails_is_named(toys: Path, name: str, message: str) -> None:
    with pytest.raises(SourceError, match=f"^{re.escape(message)}"):
        load_model(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "text source 'fails' of package toy-sources failed on 'fails': ZeroDivisionError"),
        (
            "wrong",
            "text source 'wrong' of package toy-sources returned a builtins.str for 'wrong' instead of a builtins.l",
        ),
        ("numbers", "text 'numbers': document 1 is a int, not a string"),
    ],
)
def test_a_text_source_that_fails_is_named(toys: Path, name: str, message: str) -> None:
    with pytest.raises(SourceError, match=f"^{re.escape(message)}"):
        load_texts(name)


def test_an_entry_that_is_no_source_is_named(toys: Path) -> None:
    with pytest.raises(
        RegistryError, match=r"model source 'value' of package toy-sources \(toy_sources:value\): 3 is not"
    ):
        load_model("value")
    with pytest.raises(RegistryError, match=r"text source 'value' of package toy-sources .*: 3 is not a callable"):
        load_texts("value")
    with pytest.raises(
        RegistryError, match=r"model source 'missing' of package toy-sources .* failed to import: Attrib"
    ):
        load_model("missing")


def test_a_name_taken_twice_names_both_packages(toys: Path) -> None:
    install_package(
        toys, "other-sources", {"tdkit.models": {"twice": "toy_sources:model", "other": "toy_sources:model"}}, ""
    )
    with pytest.raises(
        RegistryError, match=r"model source 'twice' is provided by .*; uninstall one or rename it"
    ) as raised:
        load_model("twice:wide")
    assert "toy-sources" in str(raised.value)
    assert "other-sources" in str(raised.value)
    assert load_model("other").name == "toy"  # the conflict breaks only itself
