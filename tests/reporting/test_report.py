"""Reports of saved models and runs: the page, its figures, its numbers, and what a browser shows."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tdkit.errors import CheckpointError, MissingDependencyError
from tdkit.evaluation.reports import report as evaluation_report
from tdkit.evaluation.texts import measure_text, read_texts
from tdkit.models.checkpoint import load, save
from tdkit.recipes.recipe import Recipe
from tdkit.recipes.run import run_recipe
from tdkit.records.record import Record
from tdkit.reporting import report as reporting
from tdkit.reporting.gather import gather
from tdkit.reporting.layers import layer_drawings
from tdkit.reporting.report import Report, write_report
from tdkit.sources import load_model
from tests.cli.command import Result, run
from tests.conftest import make_gpt2
from tests.reporting.browser import look
from tests.reporting.pages import Page

Tdkit = Callable[..., Result]

pytest.importorskip("matplotlib")


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return partial(run, capsys, monkeypatch)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path, text_file: Path) -> Path:
    """A folder that the command wrote, with everything that it can record."""
    out = tmp_path_factory.mktemp("compressed") / "smaller"
    call = [
        "compress",
        gpt2_folder,
        "--with",
        "{auto: {among: [low_rank, kronecker]}}",
        "--match",
        "*.mlp.*",
        "--budget",
        "0.8",
    ]
    call += ["--calibration", text_file, "--calibration-tokens", "512", "--context", "32", "--out", out]
    call += ["--evaluation", text_file, "--evaluation-tokens", "512", "--prompt", "the state of <b>our</b> union"]
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(sys, "argv", ["tdkit", *map(str, call)])
        from tdkit.cli.app import app

        with pytest.raises(SystemExit) as stop:
            app()
        assert stop.value.code == 0
    return out


def test_compress_leaves_a_report_that_says_what_was_done(compressed: Path) -> None:
    text = (compressed / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    numbers = json.loads((compressed / "report" / "report.json").read_text(encoding="utf-8"))
    (model,) = numbers["models"]
    assert "4 of 10 weights are replaced" in model["sentence"]
    assert model["sentence"].replace("'", "&#39;") in text
    assert model["again"]["command"].startswith("tdkit compress ")
    assert model["policy"]["budget"] == 0.8
    assert re.fullmatch(r".*SHA-256 [0-9a-f]{64}", model["again"]["calibration data"])
    assert len(model["left_dense"]) == 6
    assert all(row["why"] == "no rule matches it" for row in model["left_dense"])
    assert model["dense"]["perplexity"] != model["compressed"]["perplexity"]
    assert "union" in model["samples"][0]["dense"]
    assert "the state of &lt;b&gt;our&lt;/b&gt; union" in text
    assert "b" not in page.tags
    assert model["unknown"] == []
    for heading in ("Before and after", "Left dense", "Text before and after", "To do it again"):
        assert heading in page.headings


def test_the_page_needs_nothing_from_elsewhere(compressed: Path) -> None:
    text = (compressed / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    assert not re.search(r"https?://", text)
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))


def test_every_figure_has_marks_a_name_and_a_table(compressed: Path) -> None:
    page = Page((compressed / "report" / "report.html").read_text(encoding="utf-8"))
    numbers = json.loads((compressed / "report" / "report.json").read_text(encoding="utf-8"))
    assert len(page.figures) == len(numbers["figures"]) == 6  # three frontiers, layers, spectra, choices
    for figure in page.figures:
        assert set(figure.labels) <= set(page.ids)
        assert len(figure.labels) == 2
        assert figure.caption
        assert figure.marks > 10
        assert figure.rows > 1
    for figure in numbers["figures"].values():
        assert all(len(row) == len(figure["columns"]) for row in figure["rows"])


def test_a_browser_shows_a_deep_model_by_kinds_of_layers(tdkit: Tdkit, tmp_path: Path) -> None:
    save(make_gpt2(n_layer=7), tmp_path / "deep")
    done = tdkit("compress", tmp_path / "deep", "--match", "*.mlp.*", "--budget", "0.8", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    (entry,) = gather([tmp_path / "out"]).entries
    drawing = layer_drawings(entry, "")[0]
    assert "each kind from the first to the last block" in drawing.text
    names = [row[0] for row in drawing.rows]
    assert names[2:5] == [f"transformer.h.{number}.attn.c_attn" for number in range(3)]
    page = tmp_path / "out" / "report" / "report.html"
    for width in (390, 1280):
        seen = look(page, tmp_path, width)
        assert seen.form["page"] <= width
        assert seen.form["wide"] == seen.form["cut"] == seen.complaints == []


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_a_browser_shows_it_whole(compressed: Path, tmp_path: Path, width: int, dark: bool) -> None:
    seen = look(compressed / "report" / "report.html", tmp_path, width, dark=dark)
    assert seen.complaints == []
    assert seen.form["width"] == width
    assert seen.form["page"] <= width
    assert seen.form["wide"] == []
    assert seen.form["cut"] == []
    assert len(seen.form["charts"]) == 6
    assert min(min(chart["width"], chart["height"]) for chart in seen.form["charts"]) > 150, seen.form["charts"]
    ink, back = (sum(map(int, re.findall(r"\d+", seen.form[key])[:3])) for key in ("ink", "back"))
    assert (ink > back) == dark


def test_the_command_writes_figures_as_files(compressed: Path, tdkit: Tdkit, tmp_path: Path) -> None:
    out = tmp_path / "report"
    done = tdkit("report", compressed, "--out", out)
    assert done.code == 0, done.err
    assert "4 of 10 weights are replaced" in done.out
    names = set(json.loads((out / "report.json").read_text(encoding="utf-8"))["figures"])
    assert {file.stem for file in (out / "figures").iterdir()} == names
    for name in names:
        assert (out / "figures" / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        head = (out / "figures" / f"{name}.png").read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", head[16:20])[0] == 960


def test_a_report_is_the_same_for_the_same_record(compressed: Path) -> None:
    assert Report(gather([compressed])).page() == Report(gather([compressed])).page()


def test_a_folder_with_other_files_is_not_replaced(compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files than a report"):
        write_report([compressed], tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_trees_are_printed(compressed: Path, tdkit: Tdkit) -> None:
    text = tdkit("report", compressed, "--tree").out
    assert "smaller, before:" in text
    assert "c_fc: Conv1D" in text
    assert "c_fc: FactorizedConv1D" in text
    form = json.loads(tdkit("report", compressed, "--tree", "--json").out)
    assert form["smaller"]["before"][0]["kind"] == "GPT2LMHeadModel"


def test_what_is_not_known_is_said(compressed: Path, tmp_path: Path) -> None:
    """A folder that was saved in Python holds no record."""
    place = save(load(compressed), tmp_path / "bare")
    (entry,) = gather([place]).entries
    text = " ".join(entry.unknown)
    for part in ("holds no record.json", "the quality was not measured", "no singular values", "no text was continued"):
        assert part in text
    page = Report(gather([place])).page()
    assert "the reason was not recorded" not in page.split("Left dense")[0]
    assert "not known" in page
    assert Page(page).figures[0].rows > 4


def test_evaluation_reports_join_the_models_they_are_about(
    compressed: Path, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    files = []
    for number, name in enumerate((gpt2_folder, compressed)):
        source = load_model(str(name))
        result, _ = measure_text(source, read_texts(str(text_file)), tokens=256, context=32)
        files.append(evaluation_report(source, [result]).save(tmp_path / f"{number}.json"))
    (entry,) = gather([compressed, *files]).entries
    metric = f"{text_file} perplexity"
    assert metric in entry.metrics
    assert entry.record.dense[metric] != entry.record.compressed[metric]
    other = save(load(compressed), tmp_path / "other")
    assert "belongs to none of the models" in " ".join(gather([other, files[0]]).notes)


RUN: dict[str, Any] = {
    "name": "mine",
    "steps": [
        {"evaluate": {}},
        {"compress": {"budget": 0.9, "rules": [{"match": "*.c_fc", "with": "low_rank"}]}},
        {"compress": {"budget": 0.9, "rules": [{"match": "*.mlp.c_proj", "with": {"kronecker": {"b": [2, 4]}}}]}},
        {"evaluate": {}},
        {"generate": {"prompt": "the state", "tokens": 2}},
    ],
}


def test_a_run_is_reported_with_all_its_steps(gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    data = {"evaluation": str(text_file), "evaluation_tokens": 256, "context": 32}
    results = run_recipe(Recipe.from_dict({**RUN, "model": str(gpt2_folder), "data": data}), tmp_path / "run")
    (entry,) = gather([tmp_path / "run"]).entries
    assert entry.decompositions == {"low_rank": 2, "kronecker": 2}
    assert entry.record.dense["perplexity"] == results[0]["perplexity"]
    assert entry.record.compressed["perplexity"] == results[3]["perplexity"]
    assert entry.record.dense["params"] == results[0]["params"]
    assert entry.record.compressed["params"] == results[3]["params"]
    assert entry.record.samples[0].compressed == results[4]["compressed"]
    assert entry.record.seed == 0
    assert entry.again == f"tdkit run {tmp_path}/run/recipe.yaml --out {tmp_path}/run-again"
    assert Page(Report(gather([tmp_path / "run"])).page()).figures


def test_every_candidate_of_a_comparison_is_a_point(gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    data = {"evaluation": str(text_file), "evaluation_tokens": 256, "context": 32}
    steps = [{"compare": {"match": ["*.mlp.*"], "budget": 0.9, "with": ["low_rank", "tt_matrix"]}}]
    form = {"name": "mine", "model": str(gpt2_folder), "data": data, "steps": steps}
    results = run_recipe(Recipe.from_dict(form), tmp_path / "run")
    entries = gather([tmp_path / "run"]).entries
    assert [entry.series for entry in entries] == ["low_rank", "tt_matrix"]
    for entry, row in zip(entries, results[0]["rows"][1:], strict=True):
        assert entry.record.compressed["perplexity"] == row["perplexity"]
    report = Report(gather([tmp_path / "run"]))
    assert report.choice.startswith("the largest reduction within 5% of the dense model's perplexity")
    assert len(report.frontiers[0].rows) == 3


def test_losses_of_a_distillation_are_drawn_by_stage_and_term(tmp_path: Path) -> None:
    stages = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    lines: list[dict[str, Any]] = [
        {"stage": stage, "step": step, "total": total, "loss": 3.0 / total, "terms": {"logits": 2 / total, "hidden": 1}}
        for total, (stage, step) in enumerate(stages, 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"stage": "b", "total": 4, "held_out": 0.5}])
    (tmp_path / "log.jsonl").write_text(text + '{"stage": "b", "st')
    report = Report(gather([tmp_path]))
    assert [drawing.title.rpartition(" ")[2] for drawing in report.drawings] == ["'a'", "'b'"]
    assert [row[0] for row in report.drawings[0].rows] == ["loss", "logits", "hidden"]
    assert [row[0] for row in report.drawings[1].rows] == ["loss", "logits", "hidden", "held-out loss"]
    assert len(Page(report.page()).figures) == 2


def test_nothing_to_report_is_an_error(tmp_path: Path, tdkit: Tdkit) -> None:
    done = tdkit("report", tmp_path)
    assert done.code == 1
    assert "holds no saved model, run, sweep" in done.err
    assert "does not exist" in tdkit("report", tmp_path / "nowhere").err


def test_without_the_extra_the_command_says_how_to_get_it(
    compressed: Path, gpt2_folder: Path, tdkit: Tdkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> object | None:
        return None if name == "matplotlib" else object()

    monkeypatch.setattr(reporting.importlib.util, "find_spec", found)
    with pytest.raises(
        MissingDependencyError, match=re.escape("a report needs matplotlib: pip install 'tdkit[report]'")
    ):
        write_report([compressed])
    made = tdkit("compress", gpt2_folder, "--match", "*.c_fc", "--budget", "0.9", "--out", tmp_path / "smaller")
    assert made.code == 0
    assert "no report was written: a report needs matplotlib: pip install 'tdkit[report]'" in made.err
    assert (tmp_path / "smaller" / "record.json").is_file()
    assert not (tmp_path / "smaller" / "report").exists()


def test_a_streamed_compression_says_what_was_not_kept(tdkit: Tdkit, gpt2_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    done = tdkit("compress", gpt2_folder, "--stream", "--match", "*.c_fc", "--budget", "0.9", "--out", out)
    assert done.code == 0, done.err
    (entry,) = gather([out]).entries
    assert entry.decompositions == {"low_rank": 2}
    assert entry.again is not None
    assert entry.again.startswith("tdkit compress ")
    assert entry.record.dense["params"] > entry.record.compressed["params"]
    assert "fitted one by one" in entry.unknown[0]
    numbers = json.loads((out / "report" / "report.json").read_text())
    assert {row["why"] for row in numbers["models"][0]["left_dense"]} == {"no rule matches it"}


def test_run_leaves_a_report_unless_told_not_to(
    tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    data = {"evaluation": str(text_file), "evaluation_tokens": 256, "context": 32}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({**RUN, "model": str(gpt2_folder), "data": data}))
    done = tdkit("run", recipe, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert numbers["models"][0]["policy"]["steps"][1]["compress"]["budget"] == 0.9
    again = tdkit("run", recipe, "--out", tmp_path / "run", "--overwrite", "--no-report")
    assert again.code == 0, again.err
    assert not (tmp_path / "run" / "report").exists()
    only = tdkit("run", recipe, "steps=[evaluate]", "--out", tmp_path / "other")
    assert only.code == 0, only.err
    assert "no report was written" in only.err
    assert "a run without records of a compression" in " ".join(only.err.split())


def test_models_that_were_measured_differently_are_told_apart(tmp_path: Path) -> None:
    for name, dense in (("a", 20.0), ("b", 21.0)):
        Record(
            name=name,
            model="m",
            class_name="M",
            dense={"params": 10, "perplexity": dense},
            compressed={"params": 8, "perplexity": 25.0},
        ).save(tmp_path / name / "record.json")
    assert "several stars" not in Report(gather([tmp_path / "a"])).frontiers[0].text
    both = Report(gather([tmp_path / "a", tmp_path / "b"])).frontiers[0]
    assert "several stars" in both.text
    assert [row[4] for row in both.rows] == ["1.250", "1.190", "1.000", "1.000"]
