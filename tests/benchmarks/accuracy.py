"""Perplexity of SmolLM2-135M, compressed by every decomposition, with and without calibration; writes accuracy.md.

    python tests/benchmarks/accuracy.py --run FOLDER [--rows 'low_rank/*'] [--budgets 0.8] [--tokens 12288]

Each row is stored in `docs/results/accuracy.json` when it is finished; a rerun computes only missing rows. The
calibration is measured once and stored in the run folder. All rows are evaluated on the same tokens.

`low_rank/whitened` is the method of SVD-LLM (Wang et al., 2024), the baseline of the same run. `modegpt` is the step of
MoDeGPT (Lin et al., 2024) for MLPs, with one width for all layers; `modegpt as published` its three steps, with one
share for all blocks or with its own allocation, see ``modegpt.py``.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdkit
from tdkit import (
    Auto,
    Calibration,
    Decomposition,
    Kronecker,
    LowRank,
    PermutedKronecker,
    Policy,
    Rule,
    Shrink,
    TTMatrix,
)
from tdkit.evaluation.language_models import PROTOCOL, evaluate
from tdkit.models.sites import num_params, survey
from tdkit.planning.grouping import shrink_of
from tdkit.planning.planner import applied_plan
from tdkit.sources.models import Source, load_model
from tdkit.sources.texts import spread_windows
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table
from tests.benchmarks import modegpt

SEED = 0
CONTEXT = 512
CALIBRATION_TEXT, EVALUATION_TEXT = "sotu:calibration", "sotu:evaluation"
CALIBRATION_TOKENS = 16384
OTHER_TEXTS, OTHER_TOKENS = ("python:reference", "python:source"), 6144  # of other kinds than the calibration text
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@dataclass(frozen=True)
class Scope:
    """Which layers are compressed, and the ratio of their parameters that is kept."""

    layers: str
    keep: float

    @property
    def name(self) -> str:
        return f"{self.keep:.0%} of {self.layers}"

    @property
    def match(self) -> str:
        return {"blocks": "model.layers.*", "MLP": "model.layers.*.mlp.*"}[self.layers]


SCOPES = (
    *(Scope("blocks", 0.8), Scope("MLP", 0.8), Scope("blocks", 0.6), Scope("blocks", 0.9)),
    Scope("blocks", 0.5),
)

DECOMPOSITIONS: Mapping[str, Decomposition] = {
    "low_rank": LowRank(),
    "kronecker": Kronecker(),
    "tt_matrix": TTMatrix(),
    "permuted_kronecker": PermutedKronecker(),
    "auto": Auto(),
    "joint": Auto(among=(Shrink(), LowRank())),  # MLPs get fewer hidden units, attention low rank
    "joint, untempered": Auto(among=(Shrink(temper=0.0), LowRank())),
    "shrink": Shrink(),  # smaller dense layers only
    "shrink uniform": Shrink(uniform=True),
    "modegpt": Shrink(uniform=True, by="leverage"),
}
SIGNS: Mapping[str | bool, str] = {"": "", True: "*", "both moments": "†"}  # which moments of a row are shrunk
MLP_ONLY = ("shrink uniform", "modegpt")

WANTED = (  # perplexities asked for, without training: the scope, the rows that count, the most
    *(("90% of blocks", "*", 24.9), ("80% of blocks", "*", 28.9), ("60% of blocks", "*", 43.5)),
    *(("50% of blocks", "*", 70.0), ("80% of blocks", "shrink/*", 32.0), ("60% of blocks", "shrink/*", 50.0)),
)
PUBLISHED = "modegpt as published"
TEMPERATURES = (0.03, 0.1, 0.3, 1.0)  # of its allocation; the best on a part of the calibration text is taken
CHOSEN_ON = 4096  # tokens of it

SINGLE = [name for name, kind in DECOMPOSITIONS.items() if not (isinstance(kind, Auto) or shrink_of(kind))]

METHODS: Mapping[str, dict[str, Any]] = {
    "plain": {"calibrated": False},
    "whitened": {"gradients": False, "allocation": "uniform"},
    "two-sided": {"allocation": "uniform"},
    "allocated": {"allocation": "loss"},
    "sequential": {"allocation": "loss", "sequential": True},
    "two passes": {"allocation": "loss", "passes": 2},
    "sampled": {"allocation": "loss", "calibration": "sampled"},
    "sampled, two passes": {"allocation": "loss", "calibration": "sampled", "passes": 2},
    "self-generated": {"allocation": "loss", "calibration": "self-generated"},
    "self-generated, two passes": {"allocation": "loss", "calibration": "self-generated", "passes": 2},
}
CALIBRATIONS: Mapping[str, Mapping[str, Any]] = {  # their options beside the text
    "data": {},
    "sampled": {"labels": "sampled"},
    "self-generated": {"labels": "sampled", "self_generated": CALIBRATION_TOKENS},
}


def rows() -> list[tuple[str, Scope]]:
    """All rows; those of the baseline and of the targets come first."""
    names = [f"{kind}/{method}" for kind in DECOMPOSITIONS for method in METHODS]
    names = [name for name in names if _is_row(*name.split("/"))]
    names += [f"{PUBLISHED}/uniform", f"{PUBLISHED}/allocated"]
    order = [f"low_rank/{m}" for m in ("whitened", "allocated", "two passes", "sequential", "plain", "two-sided")]
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    return [(name, scope) for scope in SCOPES for name in names]


def _is_row(kind: str, method: str) -> bool:
    """Whether a method is for a decomposition: hidden units, and `Auto`, are chosen by the loss."""
    if kind in MLP_ONLY or kind == "joint, untempered":
        return method == "allocated"
    by_loss = METHODS[method].get("allocation") == "loss"
    return by_loss or not (shrink_of(DECOMPOSITIONS[kind]) or kind == "auto")


def policy_of(model: nn.Module, kind: str, scope: Scope, allocation: str) -> Policy:
    """The policy that keeps the share of a scope; of a decomposition for MLPs, what it leaves of these meets it."""
    match, keep = scope.match, scope.keep
    if kind in MLP_ONLY:
        match = Scope("MLP", keep).match
        sizes = [
            sum(site.params for site in survey(model).sites if Rule(each, keep=True).selects(site))
            for each in (scope.match, match)
        ]
        keep = 1 - (1 - scope.keep) * sizes[0] / sizes[1]
    return Policy([Rule(match, DECOMPOSITIONS[kind], budget=keep)], allocation=allocation)


def compressed(
    source: Source, name: str, scope: Scope, calibration_with: Callable[[str], Calibration]
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of the model compressed by the method of a row, and its plan, sizes and seconds."""
    kind, _, method = name.partition("/")
    options = METHODS[method]
    model = copy.deepcopy(source.model)
    known = calibration_with(options.get("calibration", "data")) if options.get("calibrated", True) else None
    if known is not None and not options.get("gradients", True):
        known = known.inputs_only()
    policy = policy_of(model, kind, scope, options.get("allocation", "auto"))
    started = time.perf_counter()
    plan = tdkit.plan(model, policy, calibration=known)
    planned = time.perf_counter()
    passes = options.get("passes", 1)
    sequential = options.get("sequential", False)
    tdkit.compress(model, plan if passes == 1 else policy, calibration=known, sequential=sequential, passes=passes)
    fitted = time.perf_counter()
    plan = plan if passes == 1 else applied_plan(model)
    before = sum(step.params_before for step in plan if Rule(scope.match, keep=True).names_match(step.name))
    after = sum(step.params_after for step in plan if Rule(scope.match, keep=True).names_match(step.name))
    chosen: dict[str, int] = {}
    for step in plan.rewritten:
        assert step.decomposition is not None
        chosen[step.decomposition.name] = chosen.get(step.decomposition.name, 0) + 1
    return model, {
        "params": plan.params_after,
        "kept": after / before,
        "plan_seconds": round(planned - started, 1),
        "fit_seconds": round(fitted - planned, 1),
        "estimated_loss": sum(step.loss or 0.0 for step in plan) or None,
        "chosen": chosen,
        "plan": hashlib.sha256(plan.to_json().encode()).hexdigest()[:12],
        "shrunk": "both moments" if known is not None else "",
    }


@dataclass
class Seen:
    """What MoDeGPT measures, which all its rows share: the calibration windows, their moments, and the seconds."""

    windows: Tensor
    moments: list[modegpt.Moments]
    seconds: float


def seen_by_modegpt(source: Source) -> Seen:
    started = time.perf_counter()
    windows = spread_windows(CALIBRATION_TEXT, source.tokenizer, context=CONTEXT, tokens=CALIBRATION_TOKENS)
    moments = modegpt.measure(source.model, [window[None] for window in windows])
    return Seen(windows, moments, round(time.perf_counter() - started, 1))


def published(source: Source, scope: Scope, seen: Seen, *, allocated: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of the model compressed by MoDeGPT as published, and what `compressed` says of it."""
    started = time.perf_counter()
    blocks = Rule(scope.match, keep=True)
    before = sum(site.params for site in survey(source.model).sites if blocks.selects(site))
    best: tuple[float, nn.Module, int] | None = None
    for temperature in TEMPERATURES if allocated else (None,):
        model = copy.deepcopy(source.model)
        left = modegpt.compress(model, seen.moments, modegpt.shares_lost(seen.moments, 1 - scope.keep, temperature))
        few = seen.windows[: CHOSEN_ON // CONTEXT].flatten()
        found = evaluate(model, few, context=CONTEXT).perplexity if allocated else 0.0
        if best is None or found < best[0]:
            best = found, model, left
    assert best is not None
    return best[1], {
        "params": num_params(source.model) - before + best[2],
        "kept": best[2] / before,
        "plan_seconds": seen.seconds,
        "fit_seconds": round(time.perf_counter() - started, 1),
    }


def calibrated(source: Source, folder: Path, kind: str) -> tuple[Calibration, float]:
    """A calibration of the run folder, measured if it is missing, and the seconds that took."""
    name = "calibration" if kind == "data" else f"calibration-{kind}"
    saved, clock = folder / name, folder / f"{name}.seconds"
    if not saved.exists():
        started = time.perf_counter()
        measured = tdkit.calibrate(
            source.model,
            CALIBRATION_TEXT,
            **CALIBRATIONS[kind],
            tokenizer=source.tokenizer,
            context=CONTEXT,
            tokens=CALIBRATION_TOKENS,
        )
        measured.save(saved)
        clock.write_text(f"{time.perf_counter() - started:.1f}")
    return Calibration.load(saved), float(clock.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder for the calibration")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of accuracy.json and accuracy.md")
    parser.add_argument("--rows", nargs="*", default=["*"], help="globs of DECOMPOSITION/METHOD")
    parser.add_argument("--budgets", nargs="*", default=["*"], help="globs of scopes, such as '80%% of blocks'")
    parser.add_argument("--tokens", type=int, default=12288, help="to evaluate on, at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)

    source = load_model("smollm2")
    ids, *others = (
        spread_windows(name, source.tokenizer, context=CONTEXT, tokens=tokens).flatten()
        for name, tokens in ((EVALUATION_TEXT, options.tokens), *((name, OTHER_TOKENS) for name in OTHER_TEXTS))
    )

    @functools.cache
    def moments(kind: str) -> tuple[Calibration, float]:
        return calibrated(source, options.run, kind)

    @functools.cache
    def seen() -> Seen:
        return seen_by_modegpt(source)

    store = Store(options.out, ids, moments("data")[1])
    if store.find("dense", "") is None:
        store.add(
            {"row": "dense", "scope": "", "params": 134_515_008, "kept": 1.0, **measured(source.model, ids, others)}
        )
    for name, scope in rows():
        wanted = any(fnmatch.fnmatch(name, glob) for glob in options.rows)
        if not wanted or not any(fnmatch.fnmatch(scope.name, glob) for glob in options.budgets):
            continue
        if store.find(name, scope.name) is None:
            if name.startswith(PUBLISHED):
                model, took = published(source, scope, seen(), allocated=name.endswith("allocated"))
            else:
                model, took = compressed(source, name, scope, lambda kind: moments(kind)[0])
            store.add({"row": name, "scope": scope.name, **took, **measured(model, ids, others)})


def measured(model: nn.Module, ids: Tensor, others: Sequence[Tensor]) -> dict[str, Any]:
    """The perplexity, and those on texts of other kinds, to four digits."""
    found = [float(f"{evaluate(model, each, context=CONTEXT).perplexity:.4g}") for each in (ids, *others)]
    return {"perplexity": found[0], "others": dict(zip(OTHER_TEXTS, found[1:], strict=True)), "seed": SEED}


class Store:
    """The finished rows, in a JSON file and a Markdown table."""

    def __init__(self, folder: Path, ids: Tensor, calibration_seconds: float) -> None:
        self.folder = folder
        self.setting = {
            "model": "smollm2 (SmolLM2-135M-Instruct, 4-bit weights made dense)",
            "calibration": f"{CALIBRATION_TOKENS:,} tokens of {CALIBRATION_TEXT} in windows of {CONTEXT}",
            "calibration_seconds": calibration_seconds,
            "evaluation": f"{len(ids):,} tokens of {EVALUATION_TEXT} in windows of {CONTEXT}",
            "evaluation_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12],
            "protocol": PROTOCOL,
        }
        self.found: list[dict[str, Any]] = self.read()

    def read(self) -> list[dict[str, Any]]:
        """The rows in the file, including those of another run at the same time."""
        path = self.folder / "accuracy.json"
        if not path.is_file():
            return []
        form = json.loads(path.read_text(encoding="utf-8"))
        if form["setting"]["evaluation_sha256"] != self.setting["evaluation_sha256"]:
            raise SystemExit(f"{path} was measured on other tokens: move it away, or give its --tokens")
        rows: list[dict[str, Any]] = form["rows"]
        return rows

    def find(self, name: str, scope: str) -> dict[str, Any] | None:
        return next((r for r in self.found if r["row"] == name and r["scope"] == scope), None)

    def add(self, row: dict[str, Any]) -> None:
        self.found = [*self.read(), row]
        order = {"": -1, **{scope.name: number for number, scope in enumerate(SCOPES)}}
        self.found.sort(key=lambda r: (order[r["scope"]], r["perplexity"]))
        form = {"setting": self.setting, "rows": self.found}
        write_text(self.folder / "accuracy.json", json.dumps(form, indent=1) + "\n")
        write_text(self.folder / "accuracy.md", self.markdown())
        print(f"{row['scope']:16} {row['row']:32} {row['perplexity']:.4g}", flush=True)

    def markdown(self) -> str:
        dense = self.find("dense", "")
        assert dense is not None
        lines = ["# Accuracy of compressed models", ""]
        lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in self.setting.items()]
        lines += [f"- dense: perplexity {dense['perplexity']:.4g}, {dense['params']:,} params"]
        lines += [
            "- \\* with input moments shrunk towards their diagonal, † with those of gradients shrunk as well; rows "
            "without a sign are older or have none",
            "",
        ]
        for scope in SCOPES:
            table = [row for row in self.found if row["scope"] == scope.name]
            if table:
                lines += [f"## {scope.name} kept", "", self.table(table, scope)]
        lines += self.other_texts()
        bars = self.bars()
        if bars:
            lines += ["## Asked for", "", *bars, ""]
        return "\n".join(lines)

    def other_texts(self) -> list[str]:
        """The rows that are measured on texts of other kinds too."""
        cells = [
            [
                row["scope"] or "all",
                row["row"],
                f"{row['perplexity']:,.4g}",
                *(f"{v:,.4g}" for v in row["others"].values()),
            ]
            for row in self.found
            if "others" in row
        ]
        columns = ["kept", "decomposition / method", EVALUATION_TEXT, *OTHER_TEXTS]
        return ["## Text of other kinds", "", markdown_table(columns, cells)] if cells else []

    def table(self, table: list[dict[str, Any]], scope: Scope) -> str:
        peer = self.find("low_rank/whitened", scope.name)
        columns = ["decomposition / method", "perplexity", "x peer", "kept", "params", "plan s", "fit s", "seed"]
        return markdown_table(
            columns,
            (
                [
                    row["row"] + SIGNS[row.get("shrunk") or ""] + (" (peer: SVD-LLM)" if row is peer else ""),
                    f"{row['perplexity']:,.4g}",
                    f"{row['perplexity'] / peer['perplexity']:.3g}" if peer else "",
                    f"{row['kept']:.4f}",
                    f"{row['params']:,}",
                    f"{row['plan_seconds']:.0f}",
                    f"{row['fit_seconds']:.0f}",
                    str(row["seed"]),
                ]
                for row in table
            ),
        )

    def bars(self) -> list[str]:
        """The targets and the measured values."""
        lines = []
        for scope, factor in (("80% of MLP", 0.48), ("80% of blocks", 0.35), ("60% of blocks", 0.20)):
            peer, best = self.find("low_rank/whitened", scope), self.best(scope)
            if peer and best and best is not peer:
                ratio = best["perplexity"] / peer["perplexity"]
                lines.append(_bar(f"{scope}, best ({best['row']}) / peer", ratio, factor))
        dense, best = self.find("dense", ""), self.best("90% of blocks")
        for scope_ in SCOPES:
            theirs, ours = self.best(scope_.name, "modegpt*"), self.best(scope_.name, "joint/*")
            if dense and theirs and ours:
                gaps = [row["perplexity"] - dense["perplexity"] for row in (ours, theirs)]
                names = f"({ours['row']}) / that of MoDeGPT ({theirs['row']})"
                lines.append(_bar(f"{scope_.name}, perplexity above dense {names}", gaps[0] / gaps[1], 0.9))
        for scope, glob, most in WANTED:
            found = self.best(scope, glob)
            if found:
                lines.append(_bar(f"{scope}, perplexity of {found['row']}", found["perplexity"], most))
        if dense and best:
            ratio = best["perplexity"] / dense["perplexity"]
            lines.append(_bar(f"90% of blocks, best ({best['row']}) / dense", ratio, 1.25))
        for kind in ("kronecker", "tt_matrix"):
            plain, best = self.find(f"{kind}/plain", "80% of blocks"), self.best("80% of blocks", f"{kind}/*")
            if plain and best and plain is not best:
                ratio = best["perplexity"] / plain["perplexity"]
                lines.append(_bar(f"80% of blocks, best {kind} ({best['row']}) / plain", ratio, 0.05))
        for scope_ in SCOPES:
            for method in METHODS:
                auto = self.find(f"auto/{method}", scope_.name)
                singles = [self.find(f"{kind}/{method}", scope_.name) for kind in SINGLE]
                known = [row["perplexity"] for row in singles if row]
                if auto and known:
                    ratio = auto["perplexity"] / min(known)
                    lines.append(_bar(f"{scope_.name}, auto / best single, {method}", ratio, 1.02))
        return lines

    def best(self, scope: str, glob: str = "*") -> dict[str, Any] | None:
        fitting = [r for r in self.found if r["scope"] == scope and fnmatch.fnmatch(r["row"], glob)]
        return min(fitting, key=lambda r: r["perplexity"], default=None)


def _bar(what: str, ratio: float, at_most: float) -> str:
    return f"- {what}: **{ratio:.4g}**, asked for at most {at_most:g}: {'met' if ratio <= at_most else 'not met'}"


if __name__ == "__main__":
    main()
