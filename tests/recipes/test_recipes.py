"""Recipes: every fault at once, overrides, resume after an interruption."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from tdkit.errors import CheckpointError, OptionError, RecipeError, RegistryError, SourceError
from tdkit.models.checkpoint import load
from tdkit.recipes.library import load_recipe, recipe_files, recipe_text
from tdkit.recipes.recipe import Recipe, steps
from tdkit.recipes.run import run_recipe
from tests.together import run_together

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


def frontier(**options: Any) -> dict[str, Any]:
    rules = [{"match": "*.c_fc", "with": "low_rank"}]
    step = {"frontier": {"rules": rules, "budgets": [0.9, 0.8], "keep": 0.9, **options}}
    return {"name": "a", "model": "b", "data": {"evaluation": "TEXT"}, "steps": [step]}


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
        ({"name": "a", "model": "b", "steps": [{"save": {"folder": "."}}]}, "must lie inside the run folder"),
        ({"name": "a", "model": "b", "steps": [{"save": {"folder": "state.json/x"}}]}, "a name of the run's own files"),
        ({"name": "a", "model": "b", "steps": [{"save": {"folder": "after-step-1"}}]}, "a name of the run's own files"),
        ({"name": "a", "model": "b", "steps": ["evaluate"]}, "add data.evaluation"),
        (
            {
                "name": "a",
                "model": "b",
                "steps": [{"compress": {"rules": [{"match": "*", "keep": True}], "passes": 2}}],
            },
            "compress with passes: 2 needs calibrated: true",
        ),
        (frontier(keep=0.5), r"keep: 0.5 is none of the budgets \[0.9, 0.8\]"),
        (frontier(budgets=[0.9, 0.9]), r"a budget stands twice in \[0.9, 0.9\]"),
        (frontier(bits=[3]), "3 bits are not offered: 8 or 4"),
        (frontier(calibrated=True), "frontier with calibrated needs a text to calibrate on"),
        ({**frontier(), "data": {}}, "frontier needs a text to judge by"),
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


def test_a_model_that_reloads_differently_fails_the_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        model.transformer.ln_f.weight.data[0] += 1e-3
        return model

    monkeypatch.setattr("tdkit.recipes.steps.load", changed)
    with pytest.raises(CheckpointError, match="the reloaded model's outputs differ from the saved one's"):
        run_recipe(recipe, tmp_path / "run", console=QUIET)
    assert json.loads((tmp_path / "run" / "state.json").read_text())["finished"] == 3


def test_run_leaves_results_and_a_model(recipe: Recipe, tmp_path: Path) -> None:
    results = run_recipe(recipe, tmp_path / "run", console=QUIET)
    assert [r["step"] for r in results] == ["compress", "evaluate", "compress", "save"]
    assert results[3]["reloaded_identical"] is True
    assert json.loads((tmp_path / "run" / "state.json").read_text())["results"] == results
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["model", "recipe.yaml", "records", "state.json"]


def test_an_evaluation_shows_the_dense_model_and_the_ratio(recipe: Recipe, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    first = recipe.model_copy(update={"steps": (recipe.steps[1], *recipe.steps)})
    results = run_recipe(first, tmp_path / "run", console=console)
    before, after = results[0], results[2]
    assert "dense_perplexity" not in before
    assert after["dense_perplexity"] == before["perplexity"]
    assert after["dense_params"] == before["params"]
    assert after["ratio"] == after["params"] / before["params"] < 1
    rows = [line.split("│") for line in console.file.getvalue().splitlines() if "│ dense" in line or "│ mine" in line]
    assert [[cell.strip() for cell in row[1:4:2]] for row in rows] == [
        ["dense", "1.000"],
        ["dense", "1.000"],
        ["mine", f"{after['ratio']:.3f}"],
    ]
    assert "dense_perplexity" in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["../../x", "..", ".", "", "a/b", "a\\b", "/etc", "C:x", " ", "a\nb"])
def test_a_name_that_would_leave_the_runs_folder_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"name: .*must be a plain file name, since a run's folder is called by it"):
        Recipe.from_dict({**FORM, "name": name})


def test_what_will_fail_is_told_before_the_first_step(recipe: Recipe, tmp_path: Path) -> None:
    """Nothing is written either; every step is asked."""

    def with_data(**data: Any) -> Recipe:
        return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})

    for faulty, message in (
        (
            with_data(context=65),
            "'mine': steps.1.evaluate: a window of 65 tokens is longer than the 64 positions",
        ),
        (with_data(evaluation="nowhere.txt"), r"steps.1.evaluate: no text 'nowhere.txt'.*data.evaluation=PATH"),
        (with_data(evaluation_tokens=20), "steps.1.evaluate: 20 tokens do not fill one window of 32"),
    ):
        with pytest.raises(RecipeError, match=message):
            run_recipe(faulty, tmp_path / "run", console=QUIET)
    with pytest.raises(SourceError, match=r"no model 'nowhere'.* \(in a recipe: model=PATH\)"):
        run_recipe(recipe.model_copy(update={"model": "nowhere"}), tmp_path / "run", console=QUIET)
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="device='cuda' is not available here"):
            run_recipe(recipe, tmp_path / "run", device="cuda", console=QUIET)
    assert not list(tmp_path.iterdir())


def test_square_brackets_in_a_recipe_are_no_markup(recipe: Recipe, tmp_path: Path) -> None:
    prompt = "[INST] Hi [/INST] :smile: [bold]"
    rules = [{"match": r"re:.*c_[f]c", "with": "low_rank"}]
    form = recipe.to_dict() | {
        "steps": [{"compress": {"budget": 0.9, "rules": rules}}, {"generate": {"prompt": prompt}}]
    }
    console = Console(file=io.StringIO(), width=400)
    run_recipe(Recipe.from_dict(form), tmp_path / "[/run]", console=console)
    shown = console.file.getvalue()
    assert f"step 2/2 generate prompt={prompt}\n" in shown
    assert r"re:.*c_[f]c" in shown


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


def test_a_finished_run_is_told_without_its_model(recipe: Recipe, gpt2_folder: Path, tmp_path: Path) -> None:
    there = shutil.copytree(gpt2_folder, tmp_path / "there")
    recipe = recipe.model_copy(update={"model": str(there)})
    results = run_recipe(recipe, tmp_path / "run", console=QUIET)
    shutil.rmtree(there)
    console = Console(file=io.StringIO())
    assert run_recipe(recipe, tmp_path / "run", resume=True, console=console) == results
    assert console.file.getvalue().splitlines() == [
        f"step {n}/4 {kind}: done before" for n, (kind, _) in enumerate(recipe.steps, 1)
    ]


def test_resuming_what_never_ran_says_so(recipe: Recipe, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=400)
    assert len(run_recipe(recipe, tmp_path / "run", resume=True, console=console)) == 4
    assert "run holds no run to resume: starting with the first step" in console.file.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_overwrite_replaces_a_run(recipe: Recipe, tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path / "run", console=QUIET)
    (tmp_path / "run" / "model" / "note.txt").write_text("of the old run")
    other = recipe.model_copy(update={"seed": 1})
    run_recipe(other, tmp_path / "run", overwrite=True, console=QUIET)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["seed"] == 1
    assert not (tmp_path / "run" / "model" / "note.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_new_run_that_cannot_start_leaves_the_old_one(recipe: Recipe, tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path / "run", console=QUIET)
    before = contents(tmp_path)
    for change in ({"model": "nowhere"}, {"data": recipe.data.model_copy(update={"context": 65})}):
        with pytest.raises((SourceError, RecipeError), match=r"no model|longer than the 64 positions"):
            run_recipe(recipe.model_copy(update=change), tmp_path / "run", overwrite=True, console=QUIET)
        assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "state",
    ["{", "[]", "{}", '{"recipe": {}, "finished": 0}', '{"recipe": {"steps": []}, "finished": 3, "results": [1]}'],
)
def test_overwrite_leaves_a_folder_that_is_no_run(recipe: Recipe, tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds other files: give another folder"):
        run_recipe(recipe, tmp_path, overwrite=True, console=QUIET)
    (tmp_path / "recipe.yaml").write_text("mine too")
    before = contents(tmp_path)
    with pytest.raises(RecipeError, match=r"state.json is .*damaged: .*give another folder, or remove this one"):
        run_recipe(recipe, tmp_path, overwrite=True, console=QUIET)
    assert contents(tmp_path) == before


def test_overwrite_does_not_remove_what_the_recipe_reads_or_where_it_is(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(recipe, tmp_path / "run", console=QUIET)
    before = contents(tmp_path)
    again = recipe.model_copy(update={"model": str(tmp_path / "run" / "model")})
    with pytest.raises(RecipeError, match=r"the recipe reads .*model, which lies in .*run: it would be lost"):
        run_recipe(again, tmp_path / "run", overwrite=True, console=QUIET)
    monkeypatch.chdir(tmp_path / "run" / "model")
    with pytest.raises(RecipeError, match="is or holds the current folder and cannot be replaced"):
        run_recipe(recipe, "..", overwrite=True, console=QUIET)
    assert contents(tmp_path) == before


def test_a_run_in_the_current_empty_folder(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_recipe(recipe, ".", console=QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "recipe.yaml", "records", "state.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over a file")
def test_processes_carry_out_a_run_together_and_the_main_one_writes(recipe: Recipe, tmp_path: Path) -> None:
    form = recipe.to_dict()
    rules = form["steps"][0]["compress"]
    form["steps"].insert(1, {"generate": {"prompt": "the state", "tokens": 4}})
    form["steps"][3]["compress"] = {**rules, "rules": [{"match": "nothing.*", "with": "low_rank"}]}
    (tmp_path / "fails.yaml").write_text(yaml.safe_dump(form))
    (tmp_path / "works.yaml").write_text(recipe.to_yaml())
    lines = run_together(
        tmp_path,
        """
        import json
        import tdkit.support.files as files
        from tdkit.errors import PolicyError
        from tdkit.recipes import load_recipe, run_recipe

        events = []
        sys.addaudithook(lambda event, args: events.append(args) if event in ("os.mkdir", "os.rename") else None)
        results = run_recipe(load_recipe(str(folder / "works.yaml")), folder / "run")
        say(json.dumps(results))
        say(len([each for each in events if str(folder / "run") in str(each)]))
        say(raised(lambda: run_recipe(load_recipe(str(folder / "works.yaml")), folder / "run")))
        say(raised(lambda: run_recipe(load_recipe(str(folder / "fails.yaml")), folder / "stopped")).split(":")[0])
        """,
    )
    assert lines[0][0] == lines[1][0]
    assert [each["step"] for each in json.loads(lines[0][0])] == ["compress", "evaluate", "compress", "save"]
    assert int(lines[0][1]) > 0
    assert int(lines[1][1]) == 0
    assert all("holds an earlier run" in line[2] and line[3] == "PolicyError" for line in lines)
    alone = run_recipe(recipe, tmp_path / "alone", console=QUIET)
    assert alone[1]["perplexity"] == pytest.approx(json.loads(lines[0][0])[1]["perplexity"], rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "stopped").iterdir()) == [
        "after-step-1",
        "recipe.yaml",
        "records",
        "state.json",
    ]


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


def test_a_recipe_without_save_leaves_its_model(recipe: Recipe, tmp_path: Path) -> None:
    for steps_kept, last in ((1, 1), (2, 1), (3, 3)):  # compress, evaluate, compress
        short = recipe.model_copy(update={"steps": recipe.steps[:steps_kept]})
        folder = tmp_path / f"run-{steps_kept}"
        run_recipe(short, folder, console=QUIET)
        assert sorted(p.name for p in folder.iterdir() if p.name != "records") == [
            *(f"after-step-{last}", "recipe.yaml", "state.json")
        ]
        load(folder / f"after-step-{last}")


def test_a_run_killed_before_its_first_state_starts_again(recipe: Recipe, tmp_path: Path) -> None:
    short = recipe.model_copy(update={"steps": recipe.steps[1:2]})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(short.to_yaml())
    assert len(run_recipe(short, tmp_path / "run", resume=True, console=QUIET)) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.yaml").write_text("something else")
    with pytest.raises(RecipeError, match="holds other files"):
        run_recipe(short, tmp_path / "other", overwrite=True, console=QUIET)


def test_an_error_of_a_step_s_own_is_named(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdkit.recipes.steps.evaluate", lambda *_, **__: 1 / 0)
    with pytest.raises(RecipeError, match=r"step 2/4 evaluate failed: ZeroDivisionError: division by zero"):
        run_recipe(recipe, tmp_path / "run", console=QUIET)
