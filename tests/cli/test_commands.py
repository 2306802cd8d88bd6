"""Every command as its user would call it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tdkit.cli.models import policy_of
from tdkit.decompositions.registered import decompositions
from tdkit.planning.policy import Policy
from tests.cli.command import Result, run

Tdkit = Callable[..., Result]


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return partial(run, capsys, monkeypatch)


def test_help_names_every_command(tdkit: Tdkit) -> None:
    result = tdkit("--help")
    assert result.code == 0
    for command in ("decompositions", "recipes", "show", "copy", "validate", "run", "plan", "compress", "eval", "info"):
        assert command in result.out


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("tdkit")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tdkit ")


def test_decompositions_lists_the_registry(tdkit: Tdkit) -> None:
    listed = json.loads(tdkit("decompositions", "--json").out)
    assert {entry["name"] for entry in listed} == set(decompositions.names())
    assert "kronecker" in tdkit("decompositions").out


def test_a_misspelt_command_gets_the_nearest(tdkit: Tdkit) -> None:
    result = tdkit("pln", "smollm2")
    assert result.code == 2
    assert "plan" in result.err


def test_plan_prints_a_table_and_the_same_as_json(tdkit: Tdkit, gpt2_folder: Path) -> None:
    call = ("plan", gpt2_folder, "--with", "low_rank", "--match", "*.mlp.*", "--budget", "0.8")
    table, form = tdkit(*call), json.loads(tdkit(*call, "--json").out)
    assert table.code == 0
    assert "transformer.h.0.mlp.c_fc" in table.out
    assert form["params_after"] <= 0.8 * form["params_before"]


def test_plan_reads_a_policy_file(tdkit: Tdkit, gpt2_folder: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("rules:\n- {match: '*.c_fc', with: {kronecker: {terms: 2, b: [2, 4]}}}\n")
    form = json.loads(tdkit("plan", gpt2_folder, "--policy", policy, "--json").out)
    rewritten = [step for step in form["steps"] if step["decomposition"]]
    assert [step["names"] for step in rewritten] == [["transformer.h.0.mlp.c_fc"], ["transformer.h.1.mlp.c_fc"]]
    assert rewritten[0]["decomposition"] == {"kronecker": {"terms": 2, "b": [2, 4]}}


def test_a_budget_on_the_command_line_leaves_the_rest_of_a_policy_file(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("budget: 0.9\nallocation: uniform\nrules:\n- {match: '*', with: low_rank}\n")
    chosen = policy_of(policy, "low_rank", None, 0.8)
    assert chosen == replace(Policy.from_yaml(policy), budget=0.8)
    assert chosen.allocation == "uniform"


def test_compress_eval_info(tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    made = tdkit("compress", gpt2_folder, "--with", "tt_matrix", "--match", "*.mlp.*", "--budget", "0.8", "--out", out)
    assert made.code == 0, made.err
    assert (out / "tdkit.json").is_file()
    assert "tt_matrix" in tdkit("info", out).out
    assert len(json.loads(tdkit("info", out, "--json").out)["layers"]) == 4
    measured = tdkit("eval", out, "--text", text_file, "--context", "32", "--tokens", "512", "--json")
    assert json.loads(measured.out)["perplexity"] > 1
    again = tdkit("compress", gpt2_folder, "--budget", "0.8", "--out", out)
    assert again.code == 2
    assert "--overwrite" in again.err


def test_calibrated_and_sequential(tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    call = ("compress", gpt2_folder, "--match", "*.mlp.*", "--budget", "0.8", "--out", tmp_path / "smaller")
    options = ("--calibration", text_file, "--calibration-tokens", "512", "--context", "32", "--sequential")
    done = tdkit(*call, *options, "--json")
    assert done.code == 0, done.err
    form = json.loads(done.out)
    assert form["params_after"] <= 0.8 * form["params_before"]
    refused = tdkit(*call, "--sequential")
    assert refused.code == 2
    assert "--sequential needs --calibration" in refused.err
    refused = tdkit(*call, "--passes", "2")
    assert refused.code == 2
    assert "--passes 2 needs --calibration" in refused.err
    refused = tdkit(*call, "--labels", "sampled")
    assert refused.code == 2
    assert "--labels sampled needs --calibration" in refused.err
    data, sampled = (
        tdkit("plan", *call[1:-2], *options[:-1], "--labels", labels, "--json") for labels in ("data", "sampled")
    )
    assert sampled.code == 0, sampled.err
    assert sampled.out != data.out
    twice = tdkit(*call[:-1], tmp_path / "twice", *options[:-1], "--passes", "2", "--json")
    assert twice.code == 0, twice.err
    assert json.loads(twice.out)["params_after"] < json.loads(twice.out)["params_before"]


def test_dry_run_writes_nothing(tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "never"
    assert tdkit("compress", gpt2_folder, "--budget", "0.8", "--out", out, "--dry-run").code == 0
    assert tdkit("eval", gpt2_folder, "--text", text_file, "--dry-run").code == 0
    assert tdkit("run", "smollm2-demo", "--out", out, "--dry-run").code == 0
    assert not out.exists()


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (("show", "smolm2-demo"), 2, "did you mean 'smollm2-demo'"),
        (("run", "smollm2-demo", "data.contxt=5"), 2, "data.contxt: unknown key"),
        (("plan", "GPT2", "--with", "low_rnk", "--budget", "0.5"), 2, "did you mean 'low_rank'"),
        (("plan", "GPT2", "--with", "{low_rank: {rnk: 3}}"), 2, "did you mean 'rank'"),
        (("plan", "GPT2", "--match", "transfomer.*", "--budget", "0.5"), 2, "did you mean 'transformer.*'"),
        (("plan", "GPT2", "--match", "*.mlp.*", "--budget", "0.05"), 2, "cannot be met"),
        (("plan", "GPT2", "--budget", "1.5"), 2, "at most 1"),
        (("plan", "GPT2", "--policy", "nowhere.yaml"), 2, "nowhere.yaml does not exist"),
        (("plan", "GPT2", "--dtype", "int8"), 2, "int8"),
        (("info", "nowhere"), 1, "nowhere does not exist"),
        (("info", "GPT2"), 1, "was not saved by tdkit"),
        (("eval", "GPT2", "--text", "sotu:evalation"), 1, "did you mean 'sotu:evaluation'"),
        (("eval", "nobody/nothing", "--text", "TEXT"), 1, "no model 'nobody/nothing'"),
        (("eval", "GPT2", "--text", "TEXT", "--context", "60000"), 1, "do not fill one window"),
    ],
)
def test_errors_say_what_to_do(
    tdkit: Tdkit,
    gpt2_folder: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {"GPT2": str(gpt2_folder), "TEXT": str(text_file)}
    result = tdkit(*(places.get(part, part) for part in call))
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.code == code


def test_debug_shows_the_traceback(tdkit: Tdkit) -> None:
    from tdkit.errors import RegistryError

    with pytest.raises(RegistryError):
        tdkit("--debug", "show", "nothing")


def test_show_copy_validate(tdkit: Tdkit, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    assert tdkit("copy", "smollm2-demo", target).code == 0
    assert target.read_text() == tdkit("show", "smollm2-demo").out
    assert tdkit("copy", "smollm2-demo", target).code == 2
    assert tdkit("validate", target).code == 0
    shown = tdkit("show", target, "data.context=99")
    assert "context: 99" in shown.out


def test_run_on_a_local_model(tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    call = (
        "run",
        "smollm2-demo",
        f"model={gpt2_folder}",
        f"data.evaluation={text_file}",
        f"data.calibration={text_file}",
        "data.context=32",
        "data.evaluation_tokens=256",
        "data.calibration_tokens=256",
        "steps.0.compare.match=['*.mlp.*']",
        "steps.0.compare.budget=0.9",
        "--out",
        tmp_path / "run",
    )
    done = tdkit(*call, "--json")
    assert done.code == 0, done.err
    results = json.loads(done.out)
    compared = results[0]["rows"]
    assert compared[0]["name"] == "dense"
    assert all(row["params"] <= 0.9 * compared[0]["params"] for row in compared[1:])
    assert any(result.get("reloaded_identical") for result in results)
    refused = tdkit(*call)
    assert refused.code == 2
    assert "resume" in refused.err
