"""Which of several compressed models to take: the smallest whose metric is within a given loss of the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tdkit.errors import OptionError
from tdkit.planning.plan import percent
from tdkit.records.record import Record

NOT_METRICS = ("params", "bytes", "tokens_per_second")
OF_DENSE = "relative error"  # of the outputs, as a fraction of those of the dense model


@dataclass(frozen=True)
class Choice:
    """The recommended model.

    Attributes:
        record: the model; None when none is within the loss, or nothing was measured.
        text: a line that says so.
    """

    record: Record | None
    text: str


def choose(records: Sequence[Record], within: float, metric: str | None = None) -> Choice:
    """Returns the model with the fewest parameters, relative to its dense one, whose metric is within the loss.

    Args:
        records: of models that were measured, as were their dense ones.
        within: as a fraction of the dense model's metric: 0.05 allows a perplexity of 1.05 and an accuracy of 0.95
            times the dense one.
        metric: its name; the first that was measured when None. "relative error", of the outputs beside the dense
            model's, is the loss itself.

    Raises:
        OptionError: when `within` is negative.
    """
    if not within >= 0:
        raise OptionError(f"within={within!r} must be a fraction of at least 0, such as 0.05")
    names = dict.fromkeys(name for record in records for name in record.compressed)
    known = [name for name in names if name not in NOT_METRICS and not name.endswith("_stderr")]
    metric = metric or (known[0] if known else None)
    if metric is None:
        return Choice(None, "no point can be recommended: the quality was not measured")
    sized = [
        (record.compressed["params"] / record.dense["params"], _loss(record, metric), record)
        for record in records
        if record.dense.get("params") and "params" in record.compressed and metric in record.compressed
    ]
    measured = [(size, loss, record) for size, loss, record in sized if loss is not None]
    if not measured:
        return Choice(None, f"no point can be recommended: {metric} of the dense model is not known")
    what = "outputs" if metric == OF_DENSE else metric
    goal = f"the largest reduction within {within:.0%} of the dense model's {what}"
    good = [each for each in measured if each[1] <= within]
    if not good:
        _, _, nearest = min(measured, key=lambda each: each[1])
        return Choice(
            None, f"{goal}: none; the nearest is {nearest.name}, {_said(nearest, metric)}: try larger budgets"
        )
    size, _, best = min(good, key=lambda each: (each[0], each[1]))
    return Choice(best, f"{goal}: {best.name}, {percent(size)} of the parameters, {_said(best, metric)}")


def _loss(record: Record, metric: str) -> float | None:
    """Returns by which fraction a metric is worse than that of the dense model; None where that is not known."""
    dense, value = record.dense.get(metric), record.compressed[metric]
    if metric == OF_DENSE:
        return value if math.isfinite(value) else math.inf
    if dense is None or not math.isfinite(dense) or not dense:
        return None
    if not math.isfinite(value):
        return math.inf
    change = value / dense - 1
    return -change if metric in record.higher_is_better else change


def _said(record: Record, metric: str) -> str:
    dense = "" if metric == OF_DENSE else f" instead of {record.dense[metric]:.4g}"
    return f"{metric} {record.compressed[metric]:.4g}{dense}"
