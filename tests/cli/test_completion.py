"""The shell completes what is registered, quickly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdkit.cli import completion
from tdkit.decompositions.registered import decompositions
from tdkit.recipes.library import recipe_files
from tdkit.sources.models import model_sources
from tests.packages import install_package

ROOT = Path(__file__).parents[2]


def test_the_names_are_those_of_the_registries() -> None:
    assert completion.complete_decompositions("") == decompositions.names()
    assert completion.complete_recipes("smollm2-") == [name for name in recipe_files() if name.startswith("smollm2-")]
    assert set(model_sources.names()) <= set(completion.complete_models(""))


def test_other_packages_and_paths_are_completed(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_package(site, "more-names", {"tdkit.models": {"toybox": "more_names:absent"}}, "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toys" / "small").mkdir(parents=True)
    (tmp_path / "toy.yaml").touch()
    assert completion.complete_models("toy") == ["toybox", "toys/"]
    assert completion.complete_models("toys/s") == ["toys/small/"]
    assert completion.complete_models(f"{tmp_path}/to") == [f"{tmp_path}/toys/"]
    assert completion.complete_models("nowhere/x") == []
    assert completion.complete_recipes("toy") == ["toy.yaml", "toys/"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tdkit plan smollm2 --with low", "low_rank"),
        ("tdkit plan smol", "smollm2"),
        ("tdkit run smollm2-de", "smollm2-demo"),
        ("tdkit plan smollm2 --dtype bf", "bfloat16"),
        ("tdkit comp", "compress"),
    ],
)
def test_the_shell_is_answered_without_torch(line: str, expected: str, tmp_path: Path) -> None:
    """As bash asks: what has been typed is in the environment."""
    code = """
import sys
sys.argv = ["tdkit"]
from tdkit.cli.app import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    typed = {"_TDKIT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **typed, "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout.split(), done.stderr
