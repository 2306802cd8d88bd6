"""The recipe step ``heal``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tdkit.errors import RecipeError
from tdkit.recipes.recipe import Recipe, steps
from tdkit.recipes.run import run_recipe

from tdkit_distill.steps import HealStep


@pytest.fixture
def form(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(steps._loaded, "heal", HealStep)
    options = {"tokens": "3k", "learning_rate": 3e-3, "others": [str(folders["text"])], "precision": "no"}
    return {
        "name": "compress-and-heal",
        "model": str(folders["dense"]),
        "data": {"train": str(folders["text"]), "context": 16},
        "steps": [
            {"compress": {"rules": [{"match": "*.mlp.*", "with": {"low_rank": {"rank": 2}}}]}},
            {"heal": options},
        ],
    }


def test_a_recipe_heals_what_it_compressed(form: dict[str, Any], tmp_path: Path) -> None:
    said = io.StringIO()
    _, done = run_recipe(Recipe.from_dict(form), tmp_path / "run", device="cpu", console=Console(file=said, width=300))
    before, after = done["perplexity_before"], done["perplexity"]
    assert after["held out"] < 0.7 * before["held out"]
    assert done["kept_at"] <= done["tokens"] == 3008
    assert "healing: 3,000 tokens" in said.getvalue()
    assert "perplexity of held out: " in said.getvalue()


def test_what_it_cannot_do_is_told_first(form: dict[str, Any], tmp_path: Path) -> None:
    del form["data"]["train"]
    with pytest.raises(RecipeError, match=r"heal needs a text to train on"):
        run_recipe(Recipe.from_dict(form), tmp_path / "run")
    form["data"] |= {"train": "text.txt", "share": 0.5}
    with pytest.raises(RecipeError, match=r"data.share is 0.5: leave it out"):
        run_recipe(Recipe.from_dict(form), tmp_path / "run")
