"""``tdkit eval``: texts and tasks, dense and compressed folders, as a table, as JSON and as a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tdkit as package
from tdkit import LowRank, Policy, Rule
from tdkit.evaluation import Report
from tdkit.sources.models import load_model
from tests.cli.command import Result, run
from tests.evaluation.local_tasks import write_tasks

Tdkit = Callable[..., Result]


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return lambda *arguments: run(capsys, monkeypatch, *map(str, arguments))


@pytest.fixture(scope="module")
def smaller(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = load_model(str(gpt2_folder))
    package.compress(source.model, Policy([Rule("*", LowRank())], budget=0.6), progress=False)
    return package.save(source.model, tmp_path_factory.mktemp("made") / "smaller", tokenizer=source.tokenizer)


def test_one_command_measures_text_and_tasks(
    tdkit: Tdkit, gpt2_folder: Path, smaller: Path, text_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path / "tasks")
    made: dict[str, Any] = {}
    for name, folder in {"dense": gpt2_folder, "compressed": smaller}.items():
        done = tdkit(
            *("eval", folder, "--text", text_file, "--context", 32, "--tokens", 256),
            *("--tasks", f"{tasks / 'first_word.yaml'}, {tasks / 'last_word.yaml'}", "--limit", 2),
            *("--out", tmp_path / f"{name}.json", "--json"),
        )
        assert done.code == 0, done.err
        made[name] = Report.read(tmp_path / f"{name}.json")
        assert json.loads(done.out) == made[name].to_dict()
        assert "report written to" in done.err
        assert [each.task for each in made[name].results] == [str(text_file), "first_word", "last_word"]
    dense, compressed = made["dense"], made["compressed"]
    hashes = [[each.tokens_sha256 for each in report.results] for report in (dense, compressed)]
    assert hashes[0] == hashes[1]
    assert dense.model.decompositions == {}
    assert compressed.model.decompositions["low_rank"] > 0
    assert compressed.model.params < dense.model.params
    assert compressed.model.sha256 != dense.model.sha256


def test_several_models_are_measured_side_by_side(
    tdkit: Tdkit, gpt2_folder: Path, smaller: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ("--text", text_file, "--context", 32, "--tokens", 256)
    done = tdkit("eval", gpt2_folder, smaller, *options, "--out", tmp_path / "reports", "--json")
    assert done.code == 0, done.err
    files = sorted((tmp_path / "reports").iterdir())
    assert len(files) == 2
    forms = {form["model"]["name"]: form for form in json.loads(done.out)["models"]}
    assert [Report.read(file).to_dict() for file in files] == [forms[Report.read(file).model.name] for file in files]
    shown = tdkit("eval", gpt2_folder, smaller, *options)
    dense, compressed = (forms[str(name)]["model"]["params"] for name in (gpt2_folder, smaller))
    assert "1.000" in shown.out
    assert f"{compressed / dense:.3f}" in shown.out
    twice = tdkit("eval", smaller, smaller, *options, "--out", tmp_path / "again")
    assert "two models would have the report" in twice.err
    assert not (tmp_path / "again").exists()
    (tmp_path / "file").touch()
    assert "give a folder" in tdkit("eval", gpt2_folder, smaller, *options, "--out", tmp_path / "file").err


def test_several_models_are_compared_with_a_dense_one_that_is_measured_once(
    tdkit: Tdkit, gpt2_folder: Path, smaller: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdkit.evaluation import texts

    measured: list[str] = []
    measure = texts.measure_text

    def counted(source: Any, *args: Any, **options: Any) -> Any:
        measured.append(source.name)
        return measure(source, *args, **options)

    monkeypatch.setattr(texts, "measure_text", counted)
    options = ("--text", text_file, "--context", 32, "--tokens", 256, "--against", gpt2_folder, "--json")
    both = tdkit("eval", smaller, gpt2_folder, *options)
    assert both.code == 0, both.err
    assert measured.count(str(gpt2_folder)) == 2  # as the model, and once as the dense one
    alone = json.loads(tdkit("eval", gpt2_folder, *options).out)
    figures = [form["results"][0]["figures"]["dense perplexity"] for form in json.loads(both.out)["models"]]
    assert figures == [alone["results"][0]["figures"]["dense perplexity"]] * 2


def test_tables_show_errors_and_conditions(tdkit: Tdkit, smaller: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path)
    shown = tdkit(
        "eval", smaller, "--text", text_file, "--context", 32, "--tokens", 256, "--tasks", tasks, "--limit", 1
    )
    assert shown.code == 0, shown.err
    for part in (
        "non-overlapping windows",
        "at most the first 256 tokens",
        "+-",
        "first_word",
        "the first 1 documents",
    ):
        assert part in " ".join(shown.out.split())


def test_a_dry_run_loads_no_model(tdkit: Tdkit, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path)
    done = tdkit("eval", "nobody/nothing", "--text", text_file, "--tasks", tasks / "words.yaml", "--dry-run")
    assert done.code == 0, done.err
    assert "would measure nobody/nothing on up to 16,384 tokens" in done.out
    assert "on the tasks words" in done.out


def test_a_named_protocol_is_said_before_it_runs(tdkit: Tdkit, tmp_path: Path) -> None:
    (tmp_path / "lambada_test_plain_text.txt").write_text("one passage\n", encoding="utf-8")
    done = tdkit("eval", "any", "--text", f"lambada:{tmp_path}", "--dry-run", "--json")
    data = json.loads(done.out)
    assert (data["context"], data["tokens"]) == (1024, None)
    assert "the incomplete last one too" in data["protocol"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "nothing to measure: give --text, --tasks, --data or several"),
        (("--text", "TEXT", "--limit", "3"), 2, "--limit is for tasks: give --tasks"),
        (("--text", "TEXT", "--few-shot", "0"), 2, "--few-shot is for tasks"),
        (("--tasks", " , "), 2, "names no task"),
        (("--text", "TEXT", "--out", "FOLDER"), 2, "is a folder: give the name of a file"),
        (("--text", "TEXT", "--text", "wikitext-2"), 2, "'wikitext-2' has a protocol of its own"),
        (("--text", "wikitext-2"), 1, "Offline, give a copy as wikitext-2:PATH"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    tdkit: Tdkit, text_file: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    places = {"TEXT": text_file, "FOLDER": tmp_path}
    done = tdkit("eval", "nobody/nothing", *(places.get(each, each) for each in arguments))
    assert (done.code, message in done.err) == (code, True), done.err
