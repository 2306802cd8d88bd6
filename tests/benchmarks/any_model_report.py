"""The table and the picture of `any_model.py`, from the rows that it stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table
from tests.real import packages

TARGETS = (("calibrated", 0.7, 1.0), ("auto", 0.7, 1.0), ("distilled", 0.5, 2.0))  # points of the score lost at most
COLUMNS = ("method", "kept", "score", "points lost", "output error", "params", "multiply-adds", "x dense time", "CPU s")
COLOURS = {
    "plain": "#999999",
    "calibrated": "#4477aa",
    "auto": "#228833",
    "distilled": "#66cc55",
    "auto, by multiply-adds": "#117744",
    "tensorly-torch Tucker": "#ee6677",
    "tensorly-torch Tucker, distilled": "#ffaaaa",
    "torch-pruning": "#aa3377",
    "torch-pruning, distilled": "#ddaacc",
    "SVD-LLM": "#ccbb44",
}
ORDER = tuple(COLOURS)
METHODS = """\
- **plain**: `LowRank` without calibration, every weight cut to the same share.
- **calibrated**: `LowRank` in the metric of inputs and output gradients, the budget allocated by estimated loss. The \
loss is the sum of the outputs with random signs, which estimates their squared error; no labels are used.
- **auto**: `Auto`, which picks the decomposition of each weight; calibrated and allocated as well.
- **distilled**: that of *calibrated*, trained by the dense model on the examples that it was calibrated on.
- **auto, by multiply-adds**: `Auto` of low rank, Tucker and spatial pairs on ungrouped convolutions alone, \
as large as that share of the *multiply-adds* permits.
- **tensorly-torch Tucker**: its `FactorizedConv` (Tucker, kernel sizes left) for ungrouped convolutions and truncated \
SVD for linear layers, one share for all. **torch-pruning**: channels of small norm are removed until that share of \
the *multiply-adds* is left. **SVD-LLM**: truncated SVD whitened by the inputs, each weight cut to the same share; for \
models whose weights are mostly not in convolutions. *, distilled*: with the same distillation.
"""


def read(folder: Path) -> dict[str, Any]:
    """Returns the stored rows by model."""
    path = folder / "any-model.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def write(folder: Path) -> None:
    """Write any-model.md and any-model.png."""
    every = read(folder)
    write_text(folder / "any-model.md", markdown(every))
    draw(every, folder / "any-model.png")


def markdown(every: dict[str, Any]) -> str:
    """Returns the whole page."""
    lines = [
        "# Any model: real weights, compressed",
        "",
        "Made by `PYTHONPATH=. python tests/benchmarks/any_model.py`; seed 0, shared CPU cores. Rows of one model were",
        "measured on the same examples, of which none was used to calibrate, choose or train. *kept*: parameters",
        "after / before, of the whole model. *output error*: norm of the change of the outputs, relative to theirs.",
        "*multiply-adds*: of one example in a call on 8, counted by torch with nothing cached. *x dense time*: of that",
        'call, in turn with the dense model, after `tdkit.prepare(prefer="speed")`. *CPU s*: to compress, one thread.',
        "The machine was shared: how far the time of the dense row is from 1 shows how much of a ratio is noise.",
        "",
        METHODS,
        "![Score and parameters kept](any-model.png)",
        "",
        "## Targets",
        "",
        markdown_table(("model", *(f"{m} {k}: at most {p:g} lost" for m, k, p in TARGETS)), _targets(every)),
    ]
    for name, entry in every.items():
        tested = f"{entry['tested']} tested examples"
        if "error rate" not in entry["metric"]:
            tested += f", of which one is {100 / entry['tested']:.2f} points"
        lines += [f"## {name}", "", f"{entry['what'][0].upper()}{entry['what'][1:]}.", ""]
        lines += [f"Score: {entry['metric']}, in %; {tested}; {entry['steps']} steps of distillation."]
        lines += ["", table(entry["rows"])]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of one model."""
    dense, *others = rows
    others.sort(key=lambda row: (ORDER.index(row["method"]), -row["keep"]))
    return markdown_table(COLUMNS, (_cells(row, dense) for row in (dense, *others)))


def _cells(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["method"], f"{row['keep']:g}", row["failed"], *[""] * (len(COLUMNS) - 3)]
    return [
        row["method"],
        f"{row['params'] / dense['params']:.3f}",
        f"{row['score']:.1f}",
        "" if row is dense else f"{dense['score'] - row['score']:.1f}",
        f"{row['output_error']:.3f}",
        f"{row['params']:,}",
        f"{row['multiply_adds']:,}",
        f"{row['time_ratio']:.2f}",
        f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else "",
    ]


def _targets(every: dict[str, Any]) -> list[list[str]]:
    lines = []
    for name, entry in every.items():
        dense = entry["rows"][0]
        cells = [name]
        for method, keep, points in TARGETS:
            row = next((r for r in entry["rows"] if (r["method"], r["keep"]) == (method, keep)), None)
            lost = None if row is None or "failed" in row else dense["score"] - row["score"]
            cells.append("not run" if lost is None else f"{lost:.1f}: {'met' if lost <= points else 'not met'}")
        lines.append(cells)
    return lines


def draw(every: dict[str, Any], path: Path) -> None:
    """Draw one panel per model: score over the share of parameters."""
    packages.use("plotting")
    import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]

    mpl.use("agg")
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    across = 4
    down = -(-(len(every) + 1) // across)  # one for the legend
    figure, panels = pyplot.subplots(down, across, figsize=(4 * across, 3.2 * down), squeeze=False)
    known: dict[str, Any] = {}
    for panel, (name, entry) in zip(panels.flat, every.items(), strict=False):
        rows = [row for row in entry["rows"] if "failed" not in row]
        dense = rows[0]
        panel.axhline(dense["score"], color="grey", linewidth=0.8, linestyle=":")
        for method in dict.fromkeys(row["method"] for row in rows[1:]):
            points = sorted((r["params"] / dense["params"], r["score"]) for r in rows if r["method"] == method)
            style = {"marker": "s" if "distilled" in method else "o", "color": COLOURS.get(method)}
            known[method] = panel.plot(*zip(*points, strict=True), **style)[0]
        panel.set_title(name, fontsize=10)
        panel.set_ylabel(f"{entry['metric']}, %", fontsize=8)
        panel.set_xlabel("parameters kept", fontsize=8)
        panel.grid(alpha=0.3)
    for panel in list(panels.flat)[len(every) :]:
        panel.axis("off")
    list(panels.flat)[-1].legend(known.values(), known.keys(), loc="center", fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
