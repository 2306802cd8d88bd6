"""Every recipe of this package, found by listing its folder, runs to its end at toy size."""

from __future__ import annotations

import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tdkit
import torch
import yaml
from rich.console import Console
from tdkit.errors import RecipeError, TdkitError
from tdkit.models.hosts.registered import host_of
from tdkit.models.sites import num_params, replace_module
from tdkit.recipes.library import load_recipe, recipe_files
from tdkit.recipes.recipe import Recipe, steps
from tdkit.recipes.run import run_recipe
from tdkit.reporting.gather import gather

NAMES = sorted(
    file.name.removesuffix(".yaml")
    for file in resources.files("tdkit_distill.recipes").iterdir()
    if file.name.endswith(".yaml") and file.name != "smollm2-frontier.yaml"
)
FRONTIER = "smollm2-frontier"
TEXT = "\n\n".join(f"Chapter {k}. The ship {k * k} left the harbour, and the sea was calm." for k in range(160))
WIDTH, LAYERS, CONTEXT = 64, 2, 24


def tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<end>", "<mask>", "<cls>", "<sep>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        mask_token="<mask>",
        cls_token="<cls>",
        sep_token="<sep>",
        pad_token="<pad>",
    )
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``gpt2``, ``bert`` and ``classifier`` with random models, a text and labelled texts."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
    )

    folder = tmp_path_factory.mktemp("toys")
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=320, n_positions=64, **ends)
    bert = BertConfig(
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=4,
        vocab_size=320,
        max_position_embeddings=64,
        pad_token_id=4,
    )
    models = {
        "gpt2": GPT2LMHeadModel(gpt2),
        "bert": BertForMaskedLM(bert),
        "classifier": BertForSequenceClassification(bert),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer(folder / name)
    (folder / "text.txt").write_text(TEXT)
    rows = [{"sentence": line, "label": k % 2} for k, line in enumerate(TEXT.split("\n\n"))]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def toy(name: str, toys: Path) -> Recipe:
    """The recipe with its model, texts, ranks and lengths replaced by small ones; everything else as shipped."""
    form = yaml.safe_load(recipe_files()[name][0][1].read_text(encoding="utf-8"))
    task = name.endswith("-task")
    form["model"] = str(toys / ("classifier" if task else "bert" if name.startswith("bert") else "gpt2"))
    train = toys / ("rows.jsonl" if task else "text.txt")
    form["data"] = {"train": str(train), "context": CONTEXT}
    for part in ("calibration", "evaluation"):
        form["data"][part] = str(toys / "text.txt")
        form["data"][f"{part}_tokens"] = 10 * CONTEXT
    for entry in form["steps"]:
        ((kind, options),) = entry.items()
        if kind == "distill":
            options.pop("tokens", None)
            options |= {"steps": 2, "batch_size": 4, "accumulation": 2}
            text = options.setdefault("text", {})
            text |= {"length": CONTEXT, "held_out": min(text.get("held_out", 4), 4), "cache": str(toys / "cache")}
        for rule in options.get("rules", ()) if kind == "compress" else ():
            _shrink(rule["with"])
    return Recipe.from_dict(form, name)


def _shrink(decomposition: Any) -> None:
    if not isinstance(decomposition, dict):
        return
    ((_, options),) = decomposition.items()
    if "rank" in options:
        options["rank"] = 12
    if "ranks" in options:
        options["ranks"] = 6
        for side in ("in_modes", "out_modes"):
            options[side] = [4, 4, 16 if options[side][-1] == 12 else 4]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_at_toy_size_and_its_result_loads(name: str, toys: Path, tmp_path: Path) -> None:
    recipe = toy(name, toys)
    out = io.StringIO()
    results = run_recipe(recipe, tmp_path / "run", console=Console(file=out, width=200))
    assert [r["step"] for r in results] == [kind for kind, _ in recipe.steps]
    trained = [r for r in results if r["step"] == "distill"]
    assert trained
    for result in trained:
        assert result["optimizer_steps"] == 2
        assert all(v >= 0 for v in result["terms"].values())
    if not name.startswith("bert"):
        assert results[-2]["perplexity"] > 1
    compressed = [r for r in results if r["step"] == "compress"]
    assert all(r["params_after"] < r["params_before"] for r in compressed)
    model = tdkit.load(tmp_path / "run" / "model")
    assert num_params(model) == compressed[-1]["params_after"]
    if name.endswith("-task"):
        assert 0 <= trained[0]["accuracy"] <= 1
        assert 0 <= trained[0]["teacher_accuracy"] <= 1


def test_the_frontier_recipe_heals_the_size_that_it_keeps(toys: Path, tmp_path: Path) -> None:
    form = toy(FRONTIER, toys).to_dict()
    form["steps"][0]["frontier"] |= {"bits": [], "rules": [{"match": "transformer.h.*", "with": "auto"}]}
    form["steps"][1]["heal"] |= {"tokens": 8 * CONTEXT, "measurements": 1, "others": [str(toys / "text.txt")]}
    results = run_recipe(Recipe.from_dict(form), tmp_path / "run", console=Console(file=io.StringIO()))
    assert [r["step"] for r in results] == ["frontier", "heal", "evaluate", "save", "generate"]
    rows = {row["name"]: row for row in results[0]["rows"]}
    assert list(rows) == ["dense", "0.95", "0.9", "0.8"]
    assert num_params(tdkit.load(tmp_path / "run" / "model")) == rows["0.8"]["params"] == results[2]["params"]
    entries = gather([tmp_path / "run"]).entries
    assert [entry.name for entry in entries] == [FRONTIER, "0.95", "0.9", "0.8"]
    assert entries[0].series == "auto, heal"
    assert entries[0].record.compressed["perplexity"] == results[2]["perplexity"]
    assert [training.name for training in entries[0].training] == ["heal-2"]


def test_a_task_stage_starts_from_the_general_stage_and_says_what_it_took(toys: Path, tmp_path: Path) -> None:
    run_recipe(toy("bert-kronecker-8x", toys), tmp_path / "general", console=Console(file=io.StringIO()))
    form = toy("bert-kronecker-8x-task", toys).to_dict()
    form["steps"][1]["distill"] |= {"start": str(tmp_path / "general" / "model"), "optimizer": {"lr": 1e-12}}
    out = io.StringIO()
    run_recipe(Recipe.from_dict(form), tmp_path / "task", console=Console(file=out, width=2000))
    assert f"layers taken from {tmp_path / 'general' / 'model'}" in out.getvalue()
    assert "left as they are: bert.pooler.dense, classifier" in out.getvalue()
    general, task = (tdkit.load(tmp_path / name / "model").state_dict() for name in ("general", "task"))
    factors = [name for name in general if ".matrix." in name]
    assert factors
    assert all(torch.allclose(general[name], task[name], atol=1e-7) for name in factors)
    form["steps"][0]["compress"]["rules"][1]["with"]["kronecker"]["terms"] = 2
    with pytest.raises(TdkitError, match=r"attention.self.query.matrix.a: .* there, .* here"):
        run_recipe(Recipe.from_dict(form), tmp_path / "other", console=Console(file=out))


def test_labelled_rows_of_every_file_are_trained_on(toys: Path, tmp_path: Path) -> None:
    lines = (toys / "rows.jsonl").read_text().splitlines()
    halves = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for file, part in zip(halves, (lines[:50], lines[50:]), strict=True):
        file.write_text("\n".join(part))
    form = toy("bert-kronecker-8x-task", toys).to_dict()
    terms = []
    for train in (str(toys / "rows.jsonl"), list(map(str, halves))):
        form["data"]["train"] = train
        quiet = Console(file=io.StringIO())
        terms.append(run_recipe(Recipe.from_dict(form), tmp_path / str(len(terms)), console=quiet)[1]["terms"])
    assert terms[0] == terms[1]


def test_the_recipes_that_the_papers_need_are_there() -> None:
    wanted = {"gpt2-tqcompressed", "gpt2-81m", "gpt2-kngpt2", "gpt2-ttm", "gpt2-krony", "smollm2-distill"}
    assert wanted | {"bert-kronecker-8x", "bert-kronecker-21x"} <= set(NAMES)
    for name in NAMES:
        assert load_recipe(name).source


def test_the_steps_are_found_through_entry_points() -> None:
    assert {"distill", "untie", "reinitialize"} <= set(steps.names())
    assert steps.origins()["distill"] == ["tdkit-distill"]


def test_resume_goes_on_inside_an_interrupted_step(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before is not done again, and the interrupted one continues from its own checkpoint."""
    from tdkit_distill.errors import InterruptedRun
    from tdkit_distill.loop.loop import Loop

    recipe = toy("gpt2-tqcompressed", toys)
    quiet = Console(file=io.StringIO())
    run_recipe(recipe, tmp_path / "whole", console=quiet)
    plain, calls = Loop.step, []

    def interrupted(self: Any, step: int, *rest: Any) -> Any:
        calls.append(step)
        found = plain(self, step, *rest)
        return (*found[:2], True) if len(calls) == 3 else found  # as a SIGTERM in the second distill step's first step

    monkeypatch.setattr(Loop, "step", interrupted)
    with pytest.raises(InterruptedRun):
        run_recipe(recipe, tmp_path / "run", console=quiet)
    monkeypatch.undo()
    results = run_recipe(recipe, tmp_path / "run", resume=True, console=quiet)
    assert [r.get("resumed_at") for r in results if r["step"] == "distill"] == [0, 1, 0]
    one, other = (tdkit.load(tmp_path / name / "model").state_dict() for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_faults_are_told_together_and_offline_says_which_override(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(
            {"name": "x", "model": "m", "steps": [{"distill": {"losses": {"logit": 1}, "steps": 1, "lenght": 3}}]}
        )
    assert "unknown loss 'logit'; did you mean 'logits'" in str(caught.value)
    assert "lenght" in str(caught.value)
    with pytest.raises(RecipeError, match=r"distill needs a text to train on: add data.train=PATH"):
        Recipe.from_dict({"name": "x", "model": "m", "steps": [{"distill": {"losses": {"logits": 1}, "steps": 1}}]})
    with pytest.raises(TdkitError, match=r"model=PATH"):
        run_recipe(load_recipe("gpt2-krony"), tmp_path / "a", console=Console(file=io.StringIO()))
    own = [f"model={toys / 'gpt2'}", f"data.evaluation={toys / 'text.txt'}", "data.context=32"]
    recipe = load_recipe("gpt2-krony", own)
    with pytest.raises(TdkitError, match=r"no text 'Skylion007/openwebtext'.*data.train=PATH"):
        run_recipe(recipe, tmp_path / "b", console=Console(file=io.StringIO()))


def test_an_offline_teacher_in_a_recipe(toys: Path, tmp_path: Path) -> None:
    form = toy("gpt2-81m", toys).to_dict()
    form["steps"] = form["steps"][:2]
    form["steps"][1]["distill"] |= {
        "losses": {"logits": {"temperature": 2.0}},
        "offline": {"k": 320, "temperature": 2.0},
    }
    quiet = Console(file=io.StringIO())
    cached = run_recipe(Recipe.from_dict(form), tmp_path / "cached", console=quiet)
    form["steps"][1]["distill"].pop("offline")
    live = run_recipe(Recipe.from_dict(form), tmp_path / "live", console=quiet)
    assert cached[1]["terms"]["logits"] == pytest.approx(live[1]["terms"]["logits"], rel=1e-6)
    assert (tmp_path / "cached" / "teacher-2" / "teacher.json").is_file()


def full_size(name: str) -> tuple[Any, Any]:
    """The recipe's real architecture without weights, after its untie and compress steps' plans."""
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    from tdkit_distill.steps import untie

    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig()) if name.startswith("bert") else GPT2LMHeadModel(GPT2Config())
        model.tie_weights()
    recipe = load_recipe(name)
    for kind, step in recipe.steps:
        if kind == "untie":
            untie(model)
        elif kind == "compress":
            chosen = tdkit.plan(model, step.policy)  # type: ignore[attr-defined]
            put_empty_factors(model, chosen)
    return model, recipe


def put_empty_factors(model: Any, chosen: Any) -> None:
    """Put the plan's empty factors into a model on the meta device."""
    for step in chosen.rewritten:
        for name in step.names:
            module = model.get_submodule(name)
            host = host_of(module)
            assert host is not None
            if name == step.names[0]:
                matrix = step.decomposition.empty(step.shape, device="meta")
            replace_module(model, name, host.build(module, {"weight": matrix}, {}))


@pytest.mark.parametrize(
    ("name", "whole", "without_head"),
    [
        ("gpt2-tqcompressed", 119_933_764, 81_336_388),
        ("gpt2-kngpt2", 124_274_342, 85_676_966),
        ("gpt2-ttm", 84_215_424, None),
        ("gpt2-krony", 96_100_000, None),
    ],
)
def test_parameters_of_the_real_architectures(name: str, whole: int | None, without_head: int | None) -> None:
    model, _ = full_size(name)
    head = model.lm_head.weight.numel()
    if whole:
        assert num_params(model) == pytest.approx(whole, rel=0 if without_head else 2e-3)
    if without_head:
        assert num_params(model) - head == without_head


def test_gpt2_81m_is_at_most_81m_with_its_head() -> None:
    model, _ = full_size("gpt2-81m")
    assert model.lm_head.matrix is model.transformer.wte.matrix
    assert 80_000_000 < num_params(model) <= 81_000_000


@pytest.mark.parametrize(("name", "params"), [("bert-kronecker-8x", 14.3e6), ("bert-kronecker-21x", 5.2e6)])
def test_kroneckerbert_without_its_prediction_layer(name: str, params: float) -> None:
    model, _ = full_size(name)
    pooler = 768 * 768 + 768  # which a masked language model lacks
    assert num_params(model.bert) + pooler == pytest.approx(params, rel=0.03)
