"""``tdkit sweep``: grids on a model and on a recipe, several processes, what it ends in."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tdkit.planning.policy import Policy
from tests.cli.command import Result, run
from tests.reporting.pages import Page

Tdkit = Callable[..., Result]

OPTIONS = ("--match", "*.mlp.*", "--calibration-tokens", "512", "--context", "32", "--evaluation-tokens", "512")


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return partial(run, capsys, monkeypatch)


def test_a_sweep_ends_in_a_choice_and_a_report(
    tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    texts = ("--calibration", text_file, "--evaluation", text_file, "--prompt", "the state")
    call = ("sweep", gpt2_folder, "budget=0.9,0.8", "with=low_rank,kronecker", *texts, *OPTIONS, "--out", out)
    done = tdkit(*call, "--within", "0.5")
    assert done.code == 0, done.err
    assert "4/4 kronecker 0.8: " in done.err
    assert "the largest reduction within 50% of the dense model's perplexity: " in done.out
    chosen = Policy.from_yaml(out / "chosen.yaml")
    assert chosen.budget == 0.8
    records = [json.loads(file.read_text()) for file in sorted((out / "points").glob("*.json"))]
    assert [record["name"] for record in records] == ["kronecker 0.8", "kronecker 0.9", "low_rank 0.8", "low_rank 0.9"]
    assert all(record["samples"][0]["dense"] and record["samples"][0]["compressed"] for record in records)
    assert all(record["command"].startswith("tdkit sweep ") for record in records)
    assert {data["role"] for data in records[0]["data"]} == {"calibration", "evaluation"}
    pytest.importorskip("matplotlib")
    numbers = json.loads((out / "report" / "report.json").read_text())
    assert numbers["choice"] in done.out
    frontier = numbers["figures"]["frontier-perplexity-parameters"]
    assert [row[0] for row in frontier["rows"]].count("dense") == 1
    assert len(frontier["rows"]) == 5
    Page((out / "report" / "report.html").read_text())
    before = {file.name: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    more = tdkit(*call[:2], "budget=0.9,0.8,0.7", *call[3:], "--no-report", "--json")
    assert more.code == 0, more.err
    assert [row["name"] for row in json.loads(more.out)["points"]][2::3] == ["low_rank 0.7", "kronecker 0.7"]
    assert all((out / "points" / name).stat().st_mtime_ns == time for name, time in before.items())
    other = tdkit(*call[:-1], out, "--labels", "sampled")
    assert other.code == 1
    assert "holds a sweep whose options differed" in other.err


def test_several_processes_do_the_points_once(tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    call = ("sweep", gpt2_folder, "budget=0.9,0.8,0.7", "--calibration", text_file, *OPTIONS[:-2], "--no-report")
    together = tdkit(*call, "--jobs", "2", "--out", tmp_path / "two", "--json")
    assert together.code == 0, together.err
    alone = tdkit(*call, "--out", tmp_path / "one", "--json")
    two, one = (json.loads(done.out)["points"] for done in (together, alone))
    for row, other in zip(two, one, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert sorted(file.suffix for file in (tmp_path / "two").rglob("*") if file.is_file()) == [".json"] * 4
    assert not (tmp_path / "two" / "report").exists()


def test_a_recipe_is_swept_by_its_own_texts_and_policy(
    tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    rules: list[dict[str, Any]] = [{"match": "*.0.mlp.*", "keep": True}, {"match": "*.mlp.*", "with": "low_rank"}]
    texts = {"calibration": str(text_file), "evaluation": str(text_file)}
    form = {
        "name": "mine",
        "model": str(gpt2_folder),
        "seed": 5,
        "data": {**texts, "calibration_tokens": 256, "evaluation_tokens": 256, "context": 32},
        "steps": [{"compress": {"rules": rules, "budget": 0.9, "calibrated": True}}, {"evaluate": {}}],
    }
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(form))
    done = tdkit("sweep", recipe, "with=low_rank,tt_matrix", "--out", tmp_path / "sweep", "--no-report", "--json")
    assert done.code == 0, done.err
    assert "only compress is swept, and the points are evaluated; left out: evaluate" in done.err
    assert all(row["perplexity"] and row["ratio"] <= 0.9 for row in json.loads(done.out)["points"])
    record = json.loads((tmp_path / "sweep" / "points" / "tt_matrix.json").read_text())
    assert record["seed"] == 5
    assert record["policy"]["budget"] == 0.9
    assert record["policy"]["rules"][0] == {"match": "*.0.mlp.*", "keep": True}
    refused = tdkit("sweep", recipe, "budget=0.9", "--match", "*", "--out", tmp_path / "other")
    assert refused.code == 2
    assert "has a policy of its own: leave out --policy and --match" in refused.err


def test_faults_are_said_before_any_work(tdkit: Tdkit, gpt2_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    for call, message in (
        (("budget=0.9,2",), "2: policy budget"),
        (("budgt=0.9",), "did you mean 'budget'"),
        (("budget=0.9", "--log-with", "wandb"), "pip install wandb"),
        (("budget=0.9", "--labels", "sampled"), "--labels sampled needs --calibration TEXT"),
        (("budget=0.9", "--match", "nowhere"), "matched no layer"),
    ):
        done = tdkit("sweep", gpt2_folder, *call, "--out", out)
        assert done.code == 2
        assert message in done.err
        assert not out.exists()


def test_a_dry_run_lists_the_points(tdkit: Tdkit, gpt2_folder: Path, tmp_path: Path) -> None:
    done = tdkit("sweep", gpt2_folder, "budget=0.9,0.8", "with=auto", "--out", tmp_path / "sweep", "--dry-run")
    assert done.code == 0
    assert "2 points" in done.out
    assert "auto 0.8" in done.out
    assert "nothing is measured but sizes" in done.err
    assert not (tmp_path / "sweep").exists()
