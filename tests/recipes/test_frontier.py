"""The frontier step: several sizes with and without rounding, and the model that the next steps go on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tdkit.errors import MissingDependencyError
from tdkit.models.checkpoint import load
from tdkit.models.sites import num_params
from tdkit.recipes.recipe import Recipe
from tdkit.recipes.run import run_recipe
from tdkit.reporting.gather import gather
from tdkit.reporting.report import Report
from tdkit.sources import load_model
from tests.side_packages import use_torchao

QUIET = Console(quiet=True)
SIZES = {"rules": [{"match": "*.mlp.*", "with": "low_rank"}], "budgets": [0.8, 0.9], "keep": 0.8}


def form(gpt2_folder: Path, text_file: Path, *steps: Any, **options: Any) -> Recipe:
    data = {"evaluation": str(text_file), "evaluation_tokens": 256, "context": 32}
    data |= {"calibration": str(text_file), "calibration_tokens": 128}
    step = {"frontier": {**SIZES, **options}}
    return Recipe.from_dict({"name": "mine", "model": str(gpt2_folder), "data": data, "steps": [step, *steps]})


def test_every_size_is_measured_rounded_and_recorded(gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    use_torchao()
    recipe = form(gpt2_folder, text_file, {"save": {}}, bits=[8], calibrated=True)
    figures = run_recipe(recipe, tmp_path / "run", console=QUIET)[0]
    assert [row["name"] for row in figures["rows"]] == [
        "dense",
        "dense, 8 bits",
        "0.9",
        "0.9, 8 bits",
        "0.8",
        "0.8, 8 bits",
    ]
    dense = num_params(load_model(str(gpt2_folder)).model)
    for row in figures["rows"]:
        share = 1.0 if row["name"].startswith("dense") else float(row["name"].partition(",")[0])
        assert share - 0.05 < row["params"] / dense <= share
    by_name = {row["name"]: row for row in figures["rows"]}
    for name in ("dense", "0.9", "0.8"):
        assert by_name[f"{name}, 8 bits"]["bytes"] < 0.5 * by_name[name]["bytes"]
        assert by_name[f"{name}, 8 bits"]["perplexity"] == pytest.approx(by_name[name]["perplexity"], rel=0.02)
    assert figures["kept"] == "0.8"
    assert num_params(load(tmp_path / "run" / "model")) == by_name["0.8"]["params"]
    report = Report(gather([tmp_path / "run"]))
    assert [entry.name for entry in report.entries] == ["dense, 8 bits", "0.9", "0.9, 8 bits", "0.8", "0.8, 8 bits"]
    assert len(report.frontiers[1].rows) == 6
    assert {entry.series for entry in report.entries} == {"low_rank", "low_rank, 8 bits", "dense, 8 bits"}


def test_rounding_without_its_package_is_refused_before_any_work(
    gpt2_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingDependencyError("quantization needs torchao")

    monkeypatch.setattr("tdkit.recipes.frontier.check_torchao", missing)
    with pytest.raises(Exception, match="quantization needs torchao"):
        run_recipe(form(gpt2_folder, text_file, bits=[4]), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
