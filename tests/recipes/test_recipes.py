"""Recipes: every fault at once, overrides, resume after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from tdkit.errors import RecipeError, RegistryError
from tdkit.models.checkpoint import load
from tdkit.recipes.library import load_recipe, recipe_files, recipe_text
from tdkit.recipes.recipe import Recipe, steps
from tdkit.recipes.run import run_recipe

QUIET = Console(quiet=True)
FORM: dict[str, Any] = {
    "name": "mine",
    "model": "MODEL",
    "data": {"evaluation": "TEXT", "evaluation_tokens": 256, "context": 32},
    "steps": [
        {"compress": {"budget": 0.9, "rules": [{"match": "*.c_fc", "with": "low_rank"}]}},
        {"evaluate": {}},
        {"compress": {"budget": 0.9, "rules": [{"match": "*.mlp.c_proj", "with": {"kronecker": {"b": [2, 4]}}}]}},
        {"save": {"folder": "model"}},
    ],
}


@pytest.fixture
def recipe(gpt2_folder: Path, text_file: Path) -> Recipe:
    form = {**FORM, "model": str(gpt2_folder), "data": {**FORM["data"], "evaluation": str(text_file)}}
    return Recipe.from_dict(form)


@pytest.mark.parametrize("name", list(recipe_files()))
def test_every_shipped_recipe_is_valid_and_round_trips(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    for kind, step in recipe.steps:
        assert isinstance(step, steps.get(kind))


def test_every_fault_is_reported_together() -> None:
    form = {
        "name": "mine",
        "modle": "x",
        "data": {"context": 1},
        "steps": [
            {"compres": {}},
            {"compress": {"rules": [{"match": "*", "with": "low_rnk"}]}},
            {"evaluate": {"a": 1}},
        ],
    }
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(form, "mine.yaml")
    text = str(caught.value)
    for part in (
        "modle: unknown key",
        "model: Field required",
        "data.context: Input should be greater than or equal to 2 (got '1')",
        "steps.0: unknown step 'compres'; did you mean 'compress'?",
        "did you mean 'low_rank'?",
        "steps.2.evaluate.a: unknown key",
    ):
        assert part in text
    assert all(line.startswith("mine.yaml: ") for line in text.splitlines())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ([], "a recipe is a mapping"),
        ({"name": "a", "model": "b"}, "give a list of steps"),
        ({"name": "a", "model": "b", "steps": [{"save": {}, "evaluate": {}}]}, "one 'kind: {options}' pair"),
        ({"name": "a", "model": "b", "steps": [{"save": {"folder": "../x"}}]}, "must lie inside the run folder"),
        ({"name": "a", "model": "b", "steps": ["evaluate"]}, "add data.evaluation"),
        (
            {
                "name": "a",
                "model": "b",
                "steps": [{"compress": {"rules": [{"match": "*", "keep": True}], "passes": 2}}],
            },
            "compress with passes: 2 needs calibrated: true",
        ),
    ],
)
def test_malformed_recipes(form: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(form)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(FORM))
    recipe = load_recipe(str(path), ["model=other", "data.context=64", "steps.0.compress.budget=0.5", "seed=7"])
    assert (recipe.model, recipe.data.context, recipe.seed) == ("other", 64, 7)
    assert recipe.steps[0][1].model_dump()["budget"] == 0.5
    for override, message in (
        ("model", "must be key=value"),
        ("steps.9.save.folder=x", "'9' is no position among 4"),
        ("name.sub=1", "'name' has no parts"),
        ("seed=[", "not YAML"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(str(path), [override])


def test_unknown_recipes_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="did you mean 'smollm2-demo'"):
        recipe_text("smollm2-dmo")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe_text(str(tmp_path / "none.yaml"))


def test_run_leaves_results_and_a_model(recipe: Recipe, tmp_path: Path) -> None:
    results = run_recipe(recipe, tmp_path / "run", console=QUIET)
    assert [r["step"] for r in results] == ["compress", "evaluate", "compress", "save"]
    assert results[3]["reloaded_identical"] is True
    assert json.loads((tmp_path / "run" / "state.json").read_text())["results"] == results
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["model", "recipe.yaml", "state.json"]


def test_an_interrupted_run_resumes_to_the_same_model(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(recipe, tmp_path / "whole", console=QUIET)
    evaluate = steps.get("evaluate")
    run_evaluate = evaluate.run

    def interrupted(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "parts", console=QUIET)
    assert json.loads((tmp_path / "parts" / "state.json").read_text())["finished"] == 1
    monkeypatch.setattr(evaluate, "run", run_evaluate)
    with pytest.raises(RecipeError, match="resume it, overwrite it"):
        run_recipe(recipe, tmp_path / "parts", console=QUIET)
    run_recipe(recipe, tmp_path / "parts", resume=True, console=QUIET)

    first, second = load(tmp_path / "whole" / "model"), load(tmp_path / "parts" / "model")
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_resume_refuses_another_recipe_and_a_damaged_state(recipe: Recipe, tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path / "run", console=QUIET)
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(RecipeError, match="another recipe or other options"):
        run_recipe(other, tmp_path / "run", resume=True, console=QUIET)
    (tmp_path / "run" / "state.json").write_text("{")
    with pytest.raises(RecipeError, match="damaged"):
        run_recipe(recipe, tmp_path / "run", resume=True, console=QUIET)


def test_a_folder_with_other_files_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds other files"):
        run_recipe(recipe, tmp_path, overwrite=True, console=QUIET)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
