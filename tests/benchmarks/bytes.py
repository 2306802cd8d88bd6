"""Perplexity of SmolLM2-135M against bytes: rounded weights, factors, and rounded factors; writes bytes.md.

    python -m tests.benchmarks.bytes --run FOLDER [--kinds joint low_rank] [--keep 0.9 0.8 0.6] [--tokens 12288]

The calibration, the protocol and the tokens are those of ``tests/benchmarks/accuracy.py``, with which it shares the
run folder. Each row is stored in `docs/results/bytes.json` when it is finished; a rerun computes only missing rows.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdkit
from tdkit.evaluation.language_models import PROTOCOL, evaluate
from tdkit.models.sites import num_bytes, num_params
from tdkit.sources.models import load_model
from tdkit.sources.texts import spread_windows
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table
from tests.benchmarks.accuracy import (
    CALIBRATION_TEXT,
    CALIBRATION_TOKENS,
    CONTEXT,
    EVALUATION_TEXT,
    RESULTS,
    SEED,
    Scope,
    calibrated,
    policy_of,
)

FORMS = ("float16", "int8", "int4")
KINDS = ("joint", "low_rank")
FOUR_BITS = (
    "The dense weights of this model were read from a file of 4 bits per number, so that rounding them to 4 bits again "
    "costs less than it would a model trained in 16."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder for the calibration")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of bytes.json and bytes.md")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS, help="as in accuracy.py")
    parser.add_argument("--keep", nargs="*", type=float, default=[0.9, 0.8, 0.6], help="shares of the blocks' params")
    parser.add_argument("--tokens", type=int, default=12288, help="to evaluate on, at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    source = load_model("smollm2")
    ids = spread_windows(EVALUATION_TEXT, source.tokenizer, context=CONTEXT, tokens=options.tokens).flatten()
    store = Store(options.out, ids)
    for kind, keep in (("dense", None), *itertools.product(options.kinds, options.keep)):
        name = kind if keep is None else f"{kind}/allocated, {keep:.0%} of blocks"
        missing = [form for form in FORMS if store.find(name, form) is None]
        if not missing:
            continue
        model = copy.deepcopy(source.model)
        if keep is not None:
            known, _ = calibrated(source, options.run, "data")
            tdkit.compress(model, policy_of(model, kind, Scope("blocks", keep), "loss"), calibration=known)
        for form in missing:
            made, size = in_form(copy.deepcopy(model), form)
            perplexity = float(f"{evaluate(made, ids, context=CONTEXT).perplexity:.4g}")
            row = {"row": name, "form": form, "params": num_params(made), "bytes": size}
            store.add(row | {"perplexity": perplexity, "seed": SEED})


def in_form(model: nn.Module, form: str) -> tuple[nn.Module, int]:
    """The model with its numbers in a form, and its bytes; it computes in float32."""
    model.half()
    if form == "float16":
        size = num_bytes(model)
    else:
        tdkit.quantize(model, 8 if form == "int8" else 4)
        size = num_bytes(model)
    return model.float(), size


class Store:
    """The finished rows, in a JSON file and a Markdown table."""

    def __init__(self, folder: Path, ids: Tensor) -> None:
        self.folder = folder
        self.setting = {
            "model": "smollm2 (SmolLM2-135M-Instruct, 4-bit weights made dense)",
            "calibration": f"{CALIBRATION_TOKENS:,} tokens of {CALIBRATION_TEXT} in windows of {CONTEXT}",
            "evaluation": f"{len(ids):,} tokens of {EVALUATION_TEXT} in windows of {CONTEXT}",
            "evaluation_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12],
            "protocol": PROTOCOL,
            "seed": SEED,
        }
        path = folder / "bytes.json"
        form = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"setting": self.setting, "rows": []}
        if form["setting"] != self.setting:
            raise SystemExit(f"{path} was measured otherwise: move it away")
        self.found: list[dict[str, Any]] = form["rows"]

    def find(self, name: str, form: str) -> dict[str, Any] | None:
        return next((row for row in self.found if row["row"] == name and row["form"] == form), None)

    def add(self, row: dict[str, Any]) -> None:
        self.found.append(row)
        self.found.sort(key=lambda row: row["bytes"])
        form = {"setting": self.setting, "rows": self.found}
        write_text(self.folder / "bytes.json", json.dumps(form, indent=1) + "\n")
        write_text(self.folder / "bytes.md", self.markdown())
        print(f"{row['row']:36} {row['form']:8} {row['bytes']:12,} {row['perplexity']:.4g}", flush=True)

    def markdown(self) -> str:
        lines = ["# Bytes: fewer numbers, or fewer bits", ""]
        lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in self.setting.items()]
        lines += ["", FOUR_BITS, ""]
        columns = ["numbers", "in", "MB", "of float16", "params", "perplexity", "better than all that are smaller"]
        whole = self.find("dense", "float16")
        best = float("inf")
        rows = []
        for row in self.found:
            leads, best = row["perplexity"] < best, min(best, row["perplexity"])
            share = "" if whole is None else f"{row['bytes'] / whole['bytes']:.3f}"
            cells = [row["row"], row["form"], f"{row['bytes'] / 1e6:.1f}", share, f"{row['params']:,}"]
            rows.append([*cells, f"{row['perplexity']:,.4g}", "yes" if leads else ""])
        return "\n".join([*lines, markdown_table(columns, rows), "## Beside rounding alone", "", *self.reading(), ""])

    def reading(self) -> list[str]:
        """What the rows say, from the rows."""
        alone = [row for row in self.found if row["row"] == "dense"]
        texts = []
        for row in self.found:
            if row["row"] == "dense" or not alone:
                continue
            smaller = [other for other in alone if other["bytes"] <= row["bytes"]]
            if smaller:
                other = min(smaller, key=lambda other: other["perplexity"])
                better = (
                    "rounding alone is better" if other["perplexity"] <= row["perplexity"] else "factors are better"
                )
                texts.append(
                    f"- {row['row']} in {row['form']} ({row['bytes'] / 1e6:.1f} MB, {row['perplexity']:.4g}) against "
                    f"dense in {other['form']} ({other['bytes'] / 1e6:.1f} MB, {other['perplexity']:.4g}): {better}"
                )
            else:
                texts.append(
                    f"- {row['row']} in {row['form']} ({row['bytes'] / 1e6:.1f} MB, {row['perplexity']:.4g}): rounding "
                    "alone does not reach this size"
                )
        return texts


if __name__ == "__main__":
    main()
