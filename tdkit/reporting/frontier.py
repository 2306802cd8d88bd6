"""Figures of several models: quality against parameters, bytes and time, and the losses of distillations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tdkit.reporting.drawing import INK, Drawing, colour, marker
from tdkit.reporting.entry import Entry, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {  # what a frontier is drawn over: the figure, the label of the axis, its unit
    "params": ("parameters", "parameters / dense"),
    "bytes": ("bytes", "bytes / dense"),
    "tokens_per_second": ("time", "time per token / dense"),
}


def frontiers(entries: Sequence[Entry]) -> list[Drawing]:
    """Returns a figure for each metric and each of parameters, bytes and time, where at least one model has both."""
    metrics = list(dict.fromkeys(name for entry in entries for name in entry.metrics))
    made = [_frontier(entries, metric, over) for metric in metrics for over in AXES]
    return [drawing for drawing in made if drawing is not None]


def relative(entry: Entry, over: str) -> float | None:
    """Returns the size, or time per token, of a model / that of its dense model; None where it is not known."""
    ratio = entry.ratio(over)
    return 1 / ratio if ratio and over == "tokens_per_second" else ratio


def best_points(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """Returns the points (size, metric) that no other one is better than in both, by rising size."""
    found: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not found or (value > found[-1][1] if higher else value < found[-1][1]):
            found.append((size, value))
    return found


def _frontier(entries: Sequence[Entry], metric: str, over: str) -> Drawing | None:
    points: list[tuple[Entry, float, float]] = []
    for entry in entries:
        size, value = relative(entry, over), entry.record.compressed.get(metric)
        if size is not None and value is not None and math.isfinite(value):
            points.append((entry, size, value))
    if not points:
        return None
    dense = {
        each.record.dense[metric] for each, _, _ in points if math.isfinite(each.record.dense.get(metric, math.nan))
    }
    higher = any(metric in entry.record.higher_is_better for entry, _, _ in points)
    series = list(dict.fromkeys(entry.series for entry, _, _ in points))
    what, label = AXES[over]
    best = best_points([(size, value) for _, size, value in points] + [(1.0, value) for value in dense], higher)
    values = [value for _, _, value in points] + list(dense)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.plot(*zip(*best, strict=True), color=INK, linewidth=1.2, linestyle=":", drawstyle="steps-post", zorder=1)
        for number, name in enumerate(series):
            own = [(size, value) for entry, size, value in points if entry.series == name]
            axis.plot(*zip(*own, strict=True), marker(number), color=colour(number), ms=6, label=name)
        for number, value in enumerate(sorted(dense)):
            axis.plot(1.0, value, "*", color=INK, ms=9, label="dense" if not number else None)
        if min(values) > 0 and max(values) > 8 * min(values):
            axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel(f"{metric} ({'higher' if higher else 'lower'} is better)")
        figure.legend(loc="outside upper left", ncols=3)

    rows = [
        (entry.name, entry.series, f"{size:.4f}", f"{value:.4g}", _times(value, entry.record.dense.get(metric)))
        for entry, size, value in sorted(points, key=lambda p: (p[0].series, -p[1]))
    ]
    rows += [("dense", "", "1.0000", f"{value:.4g}", "1.000") for value in sorted(dense)]
    left_out = sum(metric in e.record.compressed for e in entries) - len(points)
    text = "The dotted line joins the models that no other one is better than in both." + (
        f" {left_out} models are left out: their {what} beside the dense model, or a finite {metric}, is not known."
        if left_out
        else ""
    )
    if len(dense) > 1:
        text += (
            " The dense models differ, or were measured on different texts, so there are several stars: compare the "
            "last column of the table instead."
        )
    if what == "time":
        text += " Times are those of the evaluations, one after the other: other load on the machine shows."
    safe = "".join(c if c.isalnum() else "-" for c in metric)
    columns = ["model", "decomposition", label, metric, f"{metric} / dense"]
    return Drawing(f"frontier-{safe}-{what}", f"{metric} against {what}", text, columns, rows, 3.1, draw)


def _times(value: float, dense: float | None) -> str:
    return f"{value / dense:.3f}" if dense else ""


def training_drawings(training: Sequence[Training], prefix: str) -> list[Drawing]:
    """Returns a figure for each stage of each distillation: its loss and the terms of it, step by step."""
    made = []
    for number, run in enumerate(training, 1):
        for place, (stage, terms) in enumerate(run.stages.items(), 1):
            made.append(_losses(run, stage, terms, f"{prefix}training-{number}-{place}"))
    return made


def _losses(run: Training, stage: str, terms: object, name: str) -> Drawing:
    lines: dict[str, Sequence[tuple[int, float]]] = dict(terms)  # type: ignore[call-overload]
    if len(lines) == 2:  # one term, which the sum repeats up to its weight
        lines.pop("loss")
    first = min(step for points in lines.values() for step, _ in points)
    last = max(step for points in lines.values() for step, _ in points)
    held_out = [(step, value) for step, value in run.held_out if first - 1 <= step <= last]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for number, (label, points) in enumerate(lines.items()):
            shape = marker(number) if len(points) < 40 else "None"
            axis.plot(
                *zip(*points, strict=True), color=colour(number), marker=shape, ms=3.0, linewidth=1.2, label=label
            )
        if held_out:
            axis.plot(*zip(*held_out, strict=True), "*", color=INK, ms=8, label="held-out loss")
        values = [value for points in lines.values() for _, value in points]
        if min(values) > 0 and max(values) > 20 * min(values):
            axis.set_yscale("log")
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("loss")
        figure.legend(loc="outside upper left", ncols=3)

    rows = [(label, str(len(points)), *_ends([value for _, value in points])) for label, points in lines.items()]
    if held_out:
        rows.append(("held-out loss", str(len(held_out)), *_ends([value for _, value in held_out])))
    text = f"Stage '{stage}' of {run.name}, steps {first} to {last}; 'loss' is the weighted sum of the terms."
    columns = ["term", "points", "first", "least", "last"]
    return Drawing(name, f"Losses of {run.name}, stage '{stage}'", text, columns, rows, 2.8, draw)


def _ends(values: Sequence[float]) -> tuple[str, str, str]:
    """Returns the first, the least and the last of some losses."""
    return f"{values[0]:.4g}", f"{min(values):.4g}", f"{values[-1]:.4g}"
