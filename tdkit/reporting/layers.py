"""Figures of one compressed model: its weights along the depth, their spectra, the choices of Auto."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tdkit.planning.step import Step
from tdkit.records.spectra import Spectrum, kind_of
from tdkit.reporting.drawing import FAINT, INK, Drawing, colour, marker
from tdkit.reporting.entry import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 8  # kinds of layers whose spectra are drawn
MANY = 24  # weights above which those of one kind are drawn side by side


def layer_drawings(entry: Entry, prefix: str) -> list[Drawing]:
    """Returns the figures of a model for which something is known.

    Args:
        prefix: begins the names of the figures.
    """
    made = [_depth(entry, prefix), _spectra(entry, prefix), _choices(entry, prefix)]
    return [drawing for drawing in made if drawing is not None]


def _depth(entry: Entry, prefix: str) -> Drawing | None:
    """Kept share, error and estimated loss of each weight, along the depth of the model."""
    steps: Sequence[Step] = entry.record.plan.steps if entry.record.plan else ()
    if not any(step.decomposition for step in steps):
        return None
    steps, sections = _in_sections(steps)
    kinds = list(dict.fromkeys(step.decomposition.name for step in steps if step.decomposition))
    panels: list[tuple[str, list[float | None]]] = [
        ("kept share", [step.params_after / step.params_before if step.params_before else 1.0 for step in steps]),
        ("relative error", [step.error for step in steps]),
        ("estimated loss\n(nats per token)", [step.loss for step in steps]),
    ]
    panels = [(label, values) for label, values in panels if any(value is not None for value in values)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (label, values) in zip(axes, panels, strict=True):
            _bars(axis, steps, kinds, values)
            axis.set_ylabel(label)
            axis.grid(axis="x", visible=False)
        for axis in axes:
            for _, start in sections[1:]:
                axis.axvline(start - 0.5, color=INK, linewidth=0.5)
        axes[-1].set_xlim(-0.6, len(steps) - 0.4)
        if sections:
            ends = [start for _, start in sections[1:]] + [len(steps)]
            middles = [(start + end - 1) / 2 for (_, start), end in zip(sections, ends, strict=True)]
            axes[-1].set_xticks(middles, [_short(kind) for kind, _ in sections], rotation=90, fontsize=8)
            for axis in axes:
                axis.tick_params(axis="x", length=0)
        else:
            axes[-1].set_xlabel("weights, from the first to the last of the model")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)

    rows = [
        (
            " = ".join(step.names),
            "dense" if step.decomposition is None else step.decomposition.describe(),
            _number(panels[0][1][number]),
            _number(step.error),
            _number(step.loss),
        )
        for number, step in enumerate(steps)
    ]
    missing = [
        name for name, known in (("relative error", 1), ("estimated loss", 2)) if all(not r[known + 2] for r in rows)
    ]
    order = "each kind from the first to the last block" if sections else "from the first to the last"
    text = f"A bar for each of {len(steps)} weights, {order}; grey ones stay dense. " + (
        f"Not known: {', '.join(missing)}." if missing else ""
    )
    if entry.training:
        text += " Errors are those of the fits, before the training."
    return Drawing(
        f"{prefix}layers",
        "What was kept of each weight, and its price",
        text.strip(),
        ["weight", "becomes", "kept share", "relative error", "estimated loss"],
        rows,
        1.25 * len(panels) + (1.6 if sections else 0.8),
        draw,
    )


def _in_sections(steps: Sequence[Step]) -> tuple[Sequence[Step], list[tuple[str, int]]]:
    """Returns the weights of a deep model ordered by kind, and the kinds with the place of their first weight.

    The weights of another model stay in their order, without kinds.
    """
    kinds: dict[str, list[Step]] = {}
    for step in steps:
        kinds.setdefault(kind_of(step.name), []).append(step)
    if len(steps) <= MANY or 3 * len(kinds) > len(steps):
        return steps, []
    ordered = [step for members in kinds.values() for step in members]
    places = itertools.accumulate((len(members) for members in kinds.values()), initial=0)
    return ordered, list(zip(kinds, places, strict=False))


def _bars(axis: Axes, steps: Sequence[Step], kinds: Sequence[str], values: Sequence[float | None]) -> None:
    for number, kind in enumerate([None, *kinds]):
        places = [
            (place, value)
            for place, (step, value) in enumerate(zip(steps, values, strict=True))
            if value is not None and (step.decomposition.name if step.decomposition else None) == kind
        ]
        if places:
            filled = colour(number - 1) if kind else FAINT
            axis.bar(
                [place for place, _ in places],
                [value for _, value in places],
                width=1.0 if len(steps) > MANY else 0.85,
                color=filled,
                label=kind or "dense",
                linewidth=0,
            )
    axis.set_ylim(bottom=0)


def _spectra(entry: Entry, prefix: str) -> Drawing | None:
    """The singular values of some weights of each kind, with the ranks that were chosen."""
    found = entry.record.spectra
    if not found:
        return None
    kinds: dict[str, list[Spectrum]] = {}
    for spectrum in found:
        kinds.setdefault(spectrum.kind, []).append(spectrum)
    drawn = dict(list(kinds.items())[:PANELS])
    lines = -(-len(drawn) // 2)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(lines, min(2, len(drawn)), squeeze=False, sharey=True).ravel()
        for axis, (kind, members) in zip(axes, drawn.items(), strict=False):
            for number, spectrum in enumerate(members):
                axis.plot(
                    spectrum.indices, spectrum.values, color=colour(number), linestyle=("-", "--", ":")[number % 3]
                )
                if spectrum.rank is not None:
                    axis.plot(spectrum.rank, _at(spectrum, spectrum.rank), marker(number), color=colour(number), ms=5)
            axis.set_yscale("log")
            axis.set_title(_short(kind), loc="left")
        for axis in axes[len(drawn) :]:
            axis.set_visible(False)
        axes[0].set_ylim(bottom=max(1e-4, min(min(each.values) for each in found) / 2))
        figure.supxlabel("singular value", fontsize=9)
        figure.supylabel("of the largest", fontsize=9)

    in_metric = "in the metric of the calibration" if found[0].calibrated else "of the weights as they are"
    ranks = any(spectrum.rank is not None for spectrum in found)
    text = (
        f"Singular values {in_metric}, of the first (solid), the middle (dashed) and the last (dotted) weight of each "
        f"kind. "
        + ("The marks are the chosen ranks." if ranks else "No rank was chosen: the factors are not low-rank.")
    )
    if len(kinds) > len(drawn):
        text += f" {len(kinds) - len(drawn)} more kinds are in the table only."
    rows = [
        (
            s.name,
            s.becomes,
            "" if s.rank is None else str(s.rank),
            str(s.indices[-1]),
            *(_number(_at(s, i)) for i in _quarters(s)),
        )
        for s in found
    ]
    return Drawing(
        f"{prefix}spectra",
        "Spectra and the chosen ranks",
        text,
        ["weight", "becomes", "rank", "singular values", "at 1/4", "at 1/2", "at 3/4", "at the rank"],
        rows,
        1.5 * lines + 0.8,
        draw,
    )


def _quarters(spectrum: Spectrum) -> list[int]:
    last = spectrum.indices[-1]
    return [max(1, last // 4), max(1, last // 2), max(1, 3 * last // 4), spectrum.rank or last]


def _at(spectrum: Spectrum, index: int) -> float:
    """Returns the kept singular value nearest to an index."""
    place = min(range(len(spectrum.indices)), key=lambda k: abs(spectrum.indices[k] - index))
    return spectrum.values[place]


def _choices(entry: Entry, prefix: str) -> Drawing | None:
    """How much larger the estimated loss of the best other decomposition would have been."""
    steps = entry.record.plan.rewritten if entry.record.plan else ()
    rivals = [(step, *_runner_up(step)) for step in steps if step.runner_up and step.loss]
    rows = [(step, name, loss) for step, name, loss in rivals if math.isfinite(loss) and loss > 0]
    if not rows:
        return None
    kinds = list(dict.fromkeys(step.decomposition.name for step, _, _ in rows if step.decomposition))

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for number, kind in enumerate(kinds):
            places = [
                (place, loss / (step.loss or 1.0))
                for place, (step, _, loss) in enumerate(rows)
                if step.decomposition and step.decomposition.name == kind
            ]
            axis.plot(*zip(*places, strict=True), marker(number), color=colour(number), ms=3.5, label=f"{kind} taken")
        axis.axhline(1, color=INK, linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xlabel("weights with a runner-up, in the order of the model")
        axis.set_ylabel("loss, runner-up / taken")
        figure.legend(loc="outside upper left", ncols=3)

    taken = ", ".join(
        f"{kind} {sum(s.decomposition.name == kind for s, _, _ in rows if s.decomposition)}" for kind in kinds
    )
    return Drawing(
        f"{prefix}choices",
        "Which decomposition was taken, and how close the runner-up was",
        f"Taken: {taken}. Near 1 the runner-up of at most the same size is as good by the estimate.",
        ["weight", "taken", "estimated loss", "runner-up", "its loss", "ratio"],
        [
            (
                step.name,
                step.decomposition.describe() if step.decomposition else "",
                _number(step.loss),
                name,
                _number(loss),
                _number(loss / (step.loss or 1.0)),
            )
            for step, name, loss in rows
        ],
        2.9,
        draw,
    )


def _runner_up(step: Step) -> tuple[str, float]:
    name, _, loss = (step.runner_up or "").rpartition(": ")
    try:
        return name, float(loss)
    except ValueError:
        return name, math.nan


def _short(kind: str) -> str:
    """Returns the last two parts of a name, which tell kinds of layers apart in little space."""
    return ".".join(kind.split(".")[-2:])[-26:]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
