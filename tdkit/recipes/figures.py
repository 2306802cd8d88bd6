"""What steps say of a measured model: the row of a table, the figures of a record, what all records of a run share."""

from __future__ import annotations

import math
from typing import Any

from tdkit.evaluation.language_models import Evaluation
from tdkit.recipes.recipe import Run

FIGURE_COLUMNS = ("model", "params", "ratio", "MB", "perplexity", "tokens/s", "fit seconds")


def figure_row(name: str, measured: Evaluation, dense: Evaluation | None, seconds: float | None) -> list[str]:
    """Returns the cells of `FIGURE_COLUMNS`."""
    return [
        name,
        f"{measured.params:,}",
        f"{measured.params / dense.params:.3f}" if dense else "",
        f"{measured.bytes / 1e6:.1f}",
        f"{measured.perplexity:.2f}"
        if math.isfinite(measured.perplexity) and measured.perplexity < 1e5
        else f"{measured.perplexity:.3g}",
        f"{measured.tokens_per_second:,.0f}",
        "" if seconds is None else f"{seconds:.1f}",
    ]


def measurements(measured: Evaluation) -> dict[str, float]:
    """Returns the figures of an evaluation as a record has them."""
    figures = {"perplexity": measured.perplexity, "tokens_per_second": measured.tokens_per_second}
    return figures if measured.stderr is None else {**figures, "perplexity_stderr": measured.stderr}


def of_run(run: Run) -> dict[str, Any]:
    """Returns what all records of a run have in common."""
    return {"name": run.recipe.name, "source": run.recipe.model, "seed": run.recipe.seed, "data": run.data}
