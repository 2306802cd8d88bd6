"""Every command as its user would call it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from tdkit.cli.policies import policy_of
from tdkit.decompositions.registered import decompositions
from tdkit.evaluation import perplexity
from tdkit.models.sites import num_params
from tdkit.planning.policy import Policy
from tdkit.sources import encode, load_model, load_texts
from tests.cli.command import Result, run
from tests.conftest import make_gpt2
from tests.packages import install_package

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


def test_plan_and_compress_print_the_share_and_the_warnings(tdkit: Tdkit, gpt2_folder: Path, tmp_path: Path) -> None:
    options = ("--with", "{low_rank: {rank: 1}}", "--match", "*.mlp.*")
    said = "4 layers are cut below a tenth of the parameters"
    table = tdkit("plan", gpt2_folder, *options)
    assert table.out.startswith("of ")
    assert "weights 100.0% can be rewritten" in table.out.splitlines()[0]
    assert f"warning: {said}" in table.out
    form = json.loads(tdkit("plan", gpt2_folder, *options, "--json").out)
    assert form["share_rewritable"] == 1
    assert form["warnings"][0].startswith(said)
    made = tdkit("compress", gpt2_folder, *options, "--out", tmp_path / "smaller")
    assert "are (" in made.out.splitlines()[0]
    assert f"warning: {said}" in made.out


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
    chosen = policy_of(policy, "low_rank", None, "0.8")
    assert chosen == replace(Policy.from_yaml(policy), budget=0.8)
    assert chosen.allocation == "uniform"


def test_compress_eval_info(tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "smaller"
    made = tdkit("compress", gpt2_folder, "--with", "tt_matrix", "--match", "*.mlp.*", "--budget", "0.8", "--out", out)
    assert made.code == 0, made.err
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "tdkit"
    assert "budget: 0.8" in (out / "README.md").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(out).transformer.h[0].mlp.c_fc).__name__ == "FactorizedConv1D"
    assert "tt_matrix" in tdkit("info", out).out
    assert len(json.loads(tdkit("info", out, "--json").out)["layers"]) == 4
    measured = tdkit("eval", out, "--text", text_file, "--context", "32", "--tokens", "512", "--json")
    source = load_model(str(out))
    ids = encode(load_texts(text_file), source.tokenizer, 512)
    expected = perplexity(source.model, ids, context=32)
    made = json.loads(measured.out)
    assert made["results"][0]["figures"]["perplexity"]["value"] == pytest.approx(expected, rel=1e-5)
    assert num_params(source.model) == made["model"]["params"]
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


def test_self_generated_text(tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    text = ("--context", "16", "--self-generated", "48")
    moments = tmp_path / "moments"
    done = tdkit("calibrate", gpt2_folder, "--text", text_file, "--tokens", "64", *text, "--out", moments)
    assert done.code == 0, done.err
    assert "7 windows of 16 tokens, of the text and of the model" in done.out
    assert json.loads((moments / "calibration.json").read_text())["weights"][3:] == pytest.approx([1.0, *[4 / 27] * 3])
    out = tmp_path / "smaller"
    call = ("compress", gpt2_folder, "--match", "*.mlp.*", "--budget", "0.8", "--out", out)
    calibration = ("--calibration", text_file, "--calibration-tokens", "64")
    assert tdkit(*call, *calibration, *text).code == 0
    record = json.loads((out / "record.json").read_text())
    assert [(data["name"], data["tokens"]) for data in record["data"]][1:] == [("generated by the model", 48)]
    sweep = ("sweep", gpt2_folder, "budget=0.8", "--match", "*.mlp.*", *calibration, "--no-report")
    assert tdkit(*sweep, *text, "--out", tmp_path / "sweep").code == 0
    for refused in (
        (*call, "--self-generated", "48", "--dry-run"),
        (*call, "--calibration", moments, "--self-generated", "48"),
        ("calibrate", gpt2_folder, "--text", text_file, "--stream", *text, "--out", tmp_path / "streamed"),
    ):
        done = tdkit(*refused)
        assert done.code == 2
        assert "--self-generated" in done.err


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
        (("eval", "GPT2", "--text", "TEXT", "--context", "60000"), 1, "longer than the 64 positions"),
        (("eval", "GPT2", "--text", "TEXT", "--context", "65"), 1, "give a context of at most 64"),
        (("plan", "GPT2", "--budget", "0.9", "--calibration", "TEXT"), 1, "longer than the 64 positions"),
        (("eval", "GPT2", "--text", "TEXT", "--context", "64", "--tokens", "60"), 1, "do not fill one window"),
        (("eval", "TEXT", "--text", "TEXT"), 1, "speech.txt is a file, and a model is given as a folder"),
        (("plan", "[/INST]", "--budget", "0.9"), 1, "no model '[/INST]'"),
        (("plan", "GPT2", "--match", "re:[a-z]+_[x]", "--budget", "0.9"), 2, "re:[a-z]+_[x]"),
        (("[/b]",), 2, "No such command '[/b]'"),
        (("show", ":smile: [bold]"), 2, "unknown recipe ':smile: [bold]'"),
        (("compress", "GPT2", "--budget", "0.9", "--out", "TEXT"), 2, "is a file: give a folder"),
        (("compress", "GPT2", "--budget", "0.9", "--out", "GPT2", "--overwrite"), 2, "holds other files"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize(
    "call",
    [
        ("compress", "GPT2", "--budget", "0.9", "--out", "never"),
        ("eval", "GPT2", "--text", "TEXT"),
        ("bench", "GPT2", "--budget", "0.9"),
        ("run", "smollm2-demo"),
        ("run", "smollm2-demo", "--dry-run"),
    ],
)
def test_a_missing_device_is_told_first(
    tdkit: Tdkit, gpt2_folder: Path, text_file: Path, call: tuple[str, ...]
) -> None:
    places = {"GPT2": str(gpt2_folder), "TEXT": str(text_file)}
    for device, message in (
        ("cuda", "is not available here"),
        ("graphics", "is no device"),
        ("cuda:x", "is no device"),
    ):
        result = tdkit(*(places.get(part, part) for part in call), "--device", device)
        assert result.code == 2
        assert f"error: device='{device}' {message}" in result.err
        assert result.err.count("\n") == 1


def test_a_model_that_is_nowhere_is_not_told_in_the_syntax_of_recipes(tdkit: Tdkit, tmp_path: Path) -> None:
    for call in (("plan",), ("compress", "--out", tmp_path / "x"), ("eval", "--text", "sotu:evaluation"), ("bench",)):
        result = tdkit(call[0], "nobody/nothing", *call[1:])
        assert result.code == 1
        assert "Offline, give the path of a local folder" in result.err
        assert "model=" not in result.err


def test_sources_lists_models_and_texts(tdkit: Tdkit, site: Path) -> None:
    entries = {"tdkit.models": {"listed": "lists_it:model"}, "tdkit.texts": {"broken": "lists_it:missing"}}
    code = 'def model(part, *, dtype):\n    """A model [of ours]."""\n'
    install_package(site, "lists-it", entries, code)
    listed = {(each["kind"], each["name"]): each for each in json.loads(tdkit("sources", "--json").out)}
    assert listed["model", "smollm2"]["packages"] == ["tdkit"]
    assert listed["text", "sotu"]["summary"].startswith("State of the Union speeches")
    assert listed["model", "listed"] == {
        "kind": "model",
        "name": "listed",
        "packages": ["lists-it"],
        "summary": "A model [of ours].",
    }
    assert listed["text", "broken"]["summary"].startswith("unavailable: text source 'broken' of package lists-it")
    assert "A model [of ours]." in tdkit("sources").out


def test_square_brackets_are_shown(tdkit: Tdkit, gpt2_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    rules = "[{match: 're:[a-z]+.*', with: low_rank}]"
    recipe.write_text(
        f"name: '[b] mine'\nmodel: '{gpt2_folder}'\nsteps:\n- compress: {{budget: 0.9, rules: {rules}}}\n"
        "- generate: {prompt: '[INST] Hi [/INST] :smile:'}\n"
    )
    for call in (("run", recipe, "--dry-run"), ("show", recipe, "seed=1"), ("run", recipe, "--out", tmp_path / "[/x]")):
        done = tdkit(*call)
        assert done.code == 0, done.err
        for part in ("[INST] Hi [/INST] :smile:", "re:[a-z]+.*"):
            assert part in done.out
    assert yaml.safe_load(tdkit("show", recipe, "seed=1").out)["name"] == "[b] mine"


WAITS = """
import time
from typing import Any
from tdkit.recipes import Run, StepConfig

class Wait(StepConfig):
    def run(self, run: Run) -> dict[str, Any]:
        (run.folder / "waits").touch()
        time.sleep(300)
        return {}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_says_what_is_left(gpt2_folder: Path, site: Path, tmp_path: Path) -> None:
    install_package(site, "waits-here", {"tdkit.steps": {"wait": "waits_here:Wait"}}, WAITS)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\nmodel: '{gpt2_folder}'\nsteps: [wait]\n")
    paths = [str(site), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    code = "from tdkit.cli.app import main; main()"
    started = subprocess.Popen(
        [sys.executable, "-c", code, "run", recipe, "--out", tmp_path / "run"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    try:
        while not (tmp_path / "run" / "waits").exists():
            assert started.poll() is None, started.stderr.read()
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=200)
    finally:
        started.kill()
        started.wait()
    assert started.returncode == 130, errors
    assert "interrupted: nothing half-written is left" in errors
    assert f"0 of 1 steps had finished and are kept in {tmp_path / 'run'}: tdkit run" in errors
    assert "--resume goes on after them" in errors
    assert "Traceback" not in errors


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


@pytest.fixture
def encoder_folder(gpt2_folder: Path, tmp_path: Path) -> Path:
    """A saved masked language model with a tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=300, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_an_encoder_is_calibrated_on_the_inputs_of_its_layers(
    tdkit: Tdkit, encoder_folder: Path, text_file: Path
) -> None:
    policy = ["--budget", "0.7", "--calibration", str(text_file), "--calibration-tokens", "128", "--context", "32"]
    result = tdkit("plan", str(encoder_folder), *policy)
    assert result.code != 0
    assert "BertForMaskedLM is no causal language model" in result.err
    assert "give --inputs-only, or calibrate it on batches with labels, --data" in result.err
    out = encoder_folder.parent / "smaller"
    assert tdkit("compress", str(encoder_folder), "--out", str(out), *policy, "--inputs-only").code == 0
    assert tdkit("info", str(out)).code == 0
    result = tdkit("plan", str(encoder_folder), "--inputs-only")
    assert result.code == 2
    assert "--inputs-only needs --calibration TEXT" in result.err


def test_few_positions_are_enough_for_short_windows(
    tdkit: Tdkit, gpt2_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    make_gpt2(vocab_size=300, n_positions=16).save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "short")
    text = ("--calibration", str(text_file), "--calibration-tokens", "128")
    result = tdkit("plan", str(tmp_path / "short"), "--budget", "0.7", *text, "--context", "16")
    assert result.code == 0, result.err


def test_models_that_take_no_text_are_told_how_to_be_measured(
    tdkit: Tdkit, encoder_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from tests.tasks import TASKS

    model, _ = TASKS["vit"]()
    model.save_pretrained(tmp_path / "vit")
    for folder, message in (
        (encoder_folder, "BertForMaskedLM is no causal language model"),
        (tmp_path / "vit", "ViTForImageClassification takes pixel_values"),
    ):
        result = tdkit("eval", str(folder), "--text", str(text_file), "--context", "32", "--tokens", "64")
        assert result.code != 0
        assert message in result.err
        assert "tdkit.evaluation.score(model, batches, metric)" in result.err
        assert "tokenizer" not in result.err
    result = tdkit("plan", str(tmp_path / "vit"), "--budget", "0.7", "--calibration", str(text_file))
    assert result.code != 0
    assert "calibrate it on batches with labels, --data, or in Python, tdkit.calibrate(model, batches)" in result.err
    assert tdkit("plan", str(tmp_path / "vit"), "--budget", "0.7").code == 0
