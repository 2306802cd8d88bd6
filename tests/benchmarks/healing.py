"""Healing of compressed models: perplexity after a number of tokens, by what is trained and how.

    python -m tests.benchmarks.healing --run healing --tokens 4096
    python -m tests.benchmarks.healing --run healing --tokens 200k --rows all

SmolLM2-135M is compressed to shares of its blocks by the policy of ``accuracy.py``, once, into the run folder, and
healed by `tdkit.heal` on State of the Union speeches. Perplexity is measured on later speeches, which no choice has
seen, by the protocol of ``accuracy.py``, and on texts of two other kinds. Each row, with its curve, is added to
``docs/results/healing.json``, and ``healing.md`` beside it written again; a rerun computes only what is missing, and
goes on with a row that was interrupted.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdkit
from tdkit import Policy, Rule
from tdkit.evaluation.language_models import PROTOCOL, evaluate
from tdkit.models.sites import survey
from tdkit.sources.models import Source, load_model
from tdkit.sources.texts import spread_windows
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table
from tests.benchmarks.accuracy import (
    CALIBRATION_TEXT,
    CALIBRATION_TOKENS,
    CONTEXT,
    DECOMPOSITIONS,
    EVALUATION_TEXT,
    RESULTS,
    SEED,
    Scope,
    calibrated,
    compressed,
)

HEAL_TEXT = "sotu:calibration"
OTHERS = ("python:reference", "python:source")
TOKENS = {EVALUATION_TEXT: 12288, **dict.fromkeys(OTHERS, 4096)}


@dataclass(frozen=True)
class Row:
    """One way to heal.

    Attributes:
        kind: the decomposition of ``accuracy.py``.
        options: of `tdkit.heal`.
        first: a larger share that the model is compressed to and healed at, for half of the tokens, before it is
            compressed to its own share.
    """

    kind: str = "joint"
    options: Mapping[str, Any] = field(default_factory=dict)
    first: float | None = None


ROWS: Mapping[str, Row] = {
    "all": Row(),
    "all, teacher only": Row(options={"losses": {"logits": 1.0}}),
    "all, fewer labels": Row(options={"losses": {"logits": 1.0, "cross_entropy": 0.2}}),
    "all, labels only": Row(options={"losses": {"cross_entropy": 1.0}}),
    "all, twice the rate": Row(options={"learning_rate": 2e-4}),
    "all, half the rate": Row(options={"learning_rate": 5e-5}),
    "factors": Row(options={"method": "factors"}),
    "adapters": Row(options={"method": "adapters"}),
    "all, in two compressions": Row(first=0.8),
    "low rank, all": Row(kind="low_rank"),
    "shrunk, all": Row(kind="shrink"),
    "shrunk, adapters": Row(kind="shrink", options={"method": "adapters"}),
}


class Bench:
    """The models of a run, compressed once, and the texts they are measured on."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.source: Source = load_model("smollm2")
        self.texts: dict[str, Tensor] = {
            name: spread_windows(name, self.source.tokenizer, context=CONTEXT, tokens=tokens).flatten()
            for name, tokens in TOKENS.items()
        }

    def smaller(self, kind: str, keep: float) -> nn.Module:
        """The model compressed to a share of its blocks."""
        folder = self.run / f"{kind}-{keep:.0%}"
        if not folder.exists():
            known = calibrated(self.source, self.run, "data")[0]
            model, _ = compressed(self.source, f"{kind}/allocated", Scope("blocks", keep), lambda _: known)
            tdkit.save(model, folder, tokenizer=self.source.tokenizer)
        return tdkit.load(folder)

    def measured(self, model: nn.Module) -> dict[str, float]:
        """Perplexity by text, to four digits."""
        return {
            name: float(f"{evaluate(model, ids, context=CONTEXT).perplexity:.4g}") for name, ids in self.texts.items()
        }

    def healed(self, model: nn.Module, tokens: int, folder: Path, options: Mapping[str, Any]) -> Any:
        return tdkit.heal(
            model,
            copy.deepcopy(self.source.model),
            HEAL_TEXT,
            tokens=tokens,
            tokenizer=self.source.tokenizer,
            context=CONTEXT,
            seed=SEED,
            folder=folder,
            **options,
        )

    def result(self, name: str, keep: float, tokens: int) -> dict[str, Any]:
        """One row, as it is stored."""
        row = ROWS[name]
        folder = self.run / "-".join([name.replace(", ", "-").replace(" ", "-"), f"{keep:.0%}", str(tokens)])
        started = time.perf_counter()
        if row.first is None:
            model = self.smaller(row.kind, keep)
            found = self.measured(model)
            done = self.healed(model, tokens, folder, row.options)
            curve = list(done.measurements)
        else:
            model = self.smaller(row.kind, row.first)
            first = self.healed(model, tokens // 2, folder / "first", row.options)
            model = self.again(model, row.kind, keep)
            found = self.measured(model)
            done = self.healed(model, tokens // 2, folder / "second", row.options)
            curve = [*first.measurements, *done.measurements]
        return {
            "row": name,
            "keep": keep,
            "tokens": tokens,
            "before": found,
            "after": self.measured(model),
            "seconds": round(time.perf_counter() - started),
            "tokens_per_second": round(done.estimate.tokens_per_second, 1),
            "settings": done.settings | {"precision": done.estimate.precision},
            "curve": [[each.tokens, each.seconds, *each.perplexity.values()] for each in curve],
            "kept_at": done.after.tokens,
        }

    def again(self, model: nn.Module, kind: str, keep: float) -> nn.Module:
        """A compressed model, compressed further to a share of the blocks of the dense one."""
        blocks = Rule(Scope("blocks", keep).match, keep=True)

        def size(whole: nn.Module) -> int:
            return sum(site.params for site in survey(whole).sites if blocks.selects(site))

        tdkit.to_dense(model)
        share = keep * size(self.source.model) / size(model)
        known = tdkit.calibrate(
            model, CALIBRATION_TEXT, tokenizer=self.source.tokenizer, context=CONTEXT, tokens=CALIBRATION_TOKENS
        )
        policy = Policy([Rule(blocks.match, DECOMPOSITIONS[kind], budget=share)], allocation="loss")
        return tdkit.compress(model, policy, calibration=known)


class Store:
    """The finished rows, in a JSON file and a Markdown table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "healing.json"
        self.form: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"setting": {}, "dense": {}, "rows": []}
        )

    def find(self, name: str, keep: float, tokens: int) -> bool:
        return any((r["row"], r["keep"], r["tokens"]) == (name, keep, tokens) for r in self.form["rows"])

    def write(self) -> None:
        self.form["rows"].sort(key=lambda r: (-r["keep"], r["tokens"], r["after"][EVALUATION_TEXT]))
        write_text(self.folder / "healing.json", json.dumps(self.form, indent=1) + "\n")
        write_text(self.folder / "healing.md", markdown(self.form))


def markdown(form: Mapping[str, Any]) -> str:
    """The tables of the results."""
    dense = form["dense"]
    lines = ["# Healing", "", *(f"- {key.replace('_', ' ')}: {value}" for key, value in form["setting"].items())]
    lines += [f"- dense: {', '.join(f'{name} {value:.4g}' for name, value in dense.items())}", ""]
    for keep in sorted({row["keep"] for row in form["rows"]}, reverse=True):
        rows = [row for row in form["rows"] if row["keep"] == keep]
        columns = ["tokens", "trained", *(f"{name}: before, after" for name in dense), "x dense", "tokens/s"]
        cells = [
            [
                f"{row['tokens']:,}" + (f" (kept at {row['kept_at']:,})" if row["kept_at"] < row["tokens"] else ""),
                row["row"],
                *(f"{row['before'][name]:.4g}, {row['after'][name]:.4g}" for name in dense),
                f"{row['after'][EVALUATION_TEXT] / dense[EVALUATION_TEXT]:.3f}",
                f"{row['tokens_per_second']:.0f}",
            ]
            for row in rows
        ]
        lines += [f"## {keep:.0%} of the blocks kept", "", markdown_table(columns, cells)]
        for row in rows:
            if len(row["curve"]) > 3:
                lines += [f"### {row['row']}, {row['tokens']:,} tokens", ""]
                points = [[f"{p[0]:,}", f"{p[1]:,.0f}", *(f"{v:.4g}" for v in p[2:])] for p in row["curve"]]
                lines += [markdown_table(["tokens", "seconds", "held out", *list(dense)[1:]], points)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder for the calibration, models and checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of healing.json and healing.md")
    parser.add_argument("--rows", nargs="*", default=["*"], help="globs of rows")
    parser.add_argument("--keep", nargs="*", type=float, default=[0.8, 0.6], help="shares of the blocks")
    parser.add_argument("--tokens", default="4096", help="to train on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    tokens = int(options.tokens.replace("k", "000").replace("M", "000000"))
    bench, store = Bench(options.run), Store(options.out)
    if not store.form["dense"]:
        store.form["setting"] = {
            "model": "smollm2 (SmolLM2-135M-Instruct, 4-bit weights made dense)",
            "compressed": f"joint policy, {CALIBRATION_TOKENS:,} tokens of {CALIBRATION_TEXT}",
            "healed_on": f"{HEAL_TEXT}, windows of {CONTEXT}",
            "evaluation": ", ".join(f"{len(ids):,} tokens of {name}" for name, ids in bench.texts.items()),
            "protocol": PROTOCOL,
        }
        store.form["dense"] = bench.measured(bench.source.model)
    for keep in options.keep:
        for name, row in ROWS.items():
            wanted = any(fnmatch.fnmatch(name, glob) for glob in options.rows) and (row.first or 1) > keep
            if wanted and not store.find(name, keep, tokens):
                made = bench.result(name, keep, tokens)
                store = Store(options.out) if (options.out / "healing.json").exists() else store
                store.form["rows"].append(made)
                store.write()
                print(f"{keep:.0%} {tokens:,} {name:28} {made['before']} {made['after']}", flush=True)


if __name__ == "__main__":
    main()
