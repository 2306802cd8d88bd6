"""How ``tdkit sweep`` is carried out: by one process or several, with a live table."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.live import Live
from rich.table import Table
from torch import nn

from tdkit.calibration.batches import Batch
from tdkit.calibration.calibration import Calibration
from tdkit.cli.loading import check_model, dtype_of, source_of
from tdkit.cli.measuring import Measuring, calibration_data
from tdkit.cli.moments import Wanted
from tdkit.cli.options import Dtype, Labels
from tdkit.cli.output import err, note, settings
from tdkit.errors import OptionError, TdkitError
from tdkit.evaluation.batches import HIGHER_IS_BETTER
from tdkit.planning.policy import Policy
from tdkit.recipes.recipe import Recipe
from tdkit.recipes.steps import CompareStep, CompressStep
from tdkit.records.record import Record, Sample
from tdkit.reporting.entry import Entry, columns
from tdkit.sources.source import Source
from tdkit.support.tables import table_of
from tdkit.support.workers import share_of_threads, worker_processes
from tdkit.sweeps.grid import Point
from tdkit.sweeps.run import Sweep

WORKER = "import sys; from tdkit.cli.sweeping import work; work(sys.argv[1])"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Call:
    """The options of a sweep, JSON-able, so that other processes can take part in it.

    Attributes:
        model, build, weights: the model, as `source_of` takes it.
        points: name, policy in its YAML form, and what varied, of each.
        within: as in `choose`.
        seed: of torch's random generator; that of a recipe.
    """

    model: str | None
    build: str | None
    weights: str | None
    points: tuple[Mapping[str, Any], ...] = ()
    folder: str
    calibration: list[str] | None
    calibration_tokens: int
    self_generated: int = 0
    data: str | None
    batch_size: int
    labels: Labels
    inputs_only: bool
    context: int
    sequential: bool
    passes: int
    evaluation: list[str] | None
    evaluation_tokens: int | None
    evaluation_data: str | None
    prompt: str | None
    log_with: list[str]
    dtype: Dtype
    device: str | None
    command: str
    within: float
    seed: int = 0

    def with_points(self, points: Sequence[Point]) -> Call:
        forms = ({"name": p.name, "policy": p.policy.to_dict(), "varied": dict(p.varied)} for p in points)
        return replace(self, points=tuple(forms))

    def read_points(self) -> list[Point]:
        return [Point(form["name"], Policy.from_dict(form["policy"]), form["varied"]) for form in self.points]


def carry_out(call: Call, *, jobs: int, overwrite: bool, quiet: bool) -> list[Record]:
    """Run a sweep and return the records of its points, in order.

    Args:
        jobs: number of processes.
        overwrite: discard an earlier sweep.
        quiet: print nothing while it runs.
    """
    run = opened(call)
    view = _View(run.points, quiet or settings.quiet)
    found: dict[str, Record] = {}
    try:
        with view:
            run.progress = False if view.live is not None else None
            run.prepare(overwrite=overwrite)
            with _helpers(call, jobs):
                for name, record in run.points_as_done():
                    found[name] = record
                    view.done(found)
    except KeyboardInterrupt:
        settings.kept = f"the points that are done are kept in {call.folder}: the same call goes on after them"
        raise
    run.finish()
    return [found[point.name] for point in run.points]


def say_points(points: Sequence[Point]) -> Table:
    """Returns a table of the points of a sweep."""
    keys = list(dict.fromkeys(key for point in points for key in point.varied))
    rows = [[point.name, *(str(point.varied.get(key, "")) for key in keys)] for point in points]
    return table_of(f"{len(points)} points", ["point", *keys], rows)


def say_records(records: Sequence[Record]) -> Table:
    """Returns a table of points that are done."""
    entries = [Entry(record, Path()) for record in records]
    metrics = list(dict.fromkeys(name for entry in entries for name in entry.metrics))
    rows = [entry.row(metrics) for entry in entries if not entry.record.failure]
    return table_of(f"{len(rows)} of {len(records)} points", columns(metrics), rows)


def work(text: str) -> None:
    """Take part in a sweep, in a process of its own; what goes wrong is told by the process that started it."""
    form = json.loads(text)
    torch.set_num_threads(form["threads"])
    try:
        run = opened(Call(**{**form["call"], "points": tuple(form["call"]["points"]), "log_with": []}))
        run.progress = False
        run.prepare()
        for _ in run.points_as_done():
            pass
    except (TdkitError, KeyboardInterrupt):
        sys.exit(1)


def opened(call: Call) -> Sweep:
    """Load the model, read the texts, and return the sweep of them."""
    name = check_model(call.model, call.build, None if call.weights is None else Path(call.weights))
    wanted = Wanted(
        call.calibration,
        call.data,
        call.calibration_tokens,
        call.context,
        call.labels,
        call.inputs_only,
        call.batch_size,
        call.self_generated,
    )
    wanted.check()
    material = wanted.read()
    measuring = Measuring.of(
        call.evaluation, call.evaluation_tokens, call.context, call.prompt, call.evaluation_data, call.batch_size
    )
    torch.manual_seed(call.seed)
    source = source_of(call.model, call.build, call.weights, dtype_of(call.dtype), call.device)
    measuring.check(source)
    calibration: Calibration | Iterable[Batch] | None = material.known or material.batches_for(source)
    data = (*calibration_data(material), *measuring.data)

    def measure(model: nn.Module) -> dict[str, float]:
        return measuring.figures(Source(source.name, model, source.tokenizer), source.model)

    def samples(model: nn.Module) -> list[Sample]:
        return list(measuring.samples(None, measuring.continuation(model, source)))

    return Sweep(
        source.model,
        call.read_points(),
        calibration=calibration,
        labels=call.labels,
        gradients=not call.inputs_only,
        measure=measure,
        higher_is_better=HIGHER_IS_BETTER,
        samples=samples if call.prompt is not None else None,
        sequential=call.sequential,
        passes=call.passes,
        folder=Path(call.folder),
        device=call.device,
        log_with=call.log_with,
        source=name,
        seed=call.seed,
        command=call.command,
        data=data,
        conditions={
            "texts": [asdict(each) for each in data],
            "context": call.context,
            "dtype": call.dtype,
            "prompt": call.prompt,
        },
        told={"command": call.command, "within": call.within},
    )


@contextmanager
def _helpers(call: Call, jobs: int) -> Iterator[None]:
    """Run the other processes inside the block, each with its share of the threads."""
    others = min(jobs, len(call.points)) - 1
    if others < 1:
        yield
        return
    text = json.dumps({"call": asdict(call), "threads": share_of_threads(others + 1)})
    with worker_processes(WORKER, text, others, "a process stopped with exit code %d; the others did its points"):
        yield


class _View:
    """The table of a sweep: live on a terminal, else a line for each point that gets done."""

    def __init__(self, points: Sequence[Point], quiet: bool) -> None:
        self.points = points
        self.quiet = quiet
        self.started = time.perf_counter()
        self.told: set[str] = set()
        self.live = None if quiet or not err.is_terminal else Live(self._table({}), console=err, auto_refresh=False)
        self._context: AbstractContextManager[Any] = nullcontext() if self.live is None else self.live

    def __enter__(self) -> _View:
        self._context.__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        self._context.__exit__(*arguments)

    def done(self, found: Mapping[str, Record]) -> None:
        """Show the points that are done so far."""
        if self.live is not None:
            self.live.update(self._table(found), refresh=True)
            return
        for name, record in found.items():
            if name not in self.told and not self.quiet:
                note(f"{len(found)}/{len(self.points)} {name}: {Entry(record, Path()).result()}")
            self.told.add(name)

    def _table(self, found: Mapping[str, Record]) -> Table:
        seconds = time.perf_counter() - self.started
        left = seconds / len(found) * (len(self.points) - len(found)) if found else 0.0
        time_left = f", about {left:.0f} s left" if left else ""
        rows = [[p.name, Entry(found[p.name], Path()).result() if p.name in found else ""] for p in self.points]
        table = table_of(f"{len(found)} of {len(self.points)} points, {seconds:.0f} s{time_left}", ["point", ""], rows)
        table.columns[1].justify = "left"
        return table


def of_recipe(
    recipe: Recipe,
    call: Call,
    labels: Labels | None,
    calibration_tokens: int | None,
    context: int | None,
    self_generated: int | None = None,
) -> tuple[Policy, Call]:
    """Returns the policy that a recipe compresses by, and the call with what the command line left open."""
    found = next(((k, each) for k, each in recipe.steps if isinstance(each, CompressStep | CompareStep)), None)
    if found is None:
        raise OptionError(f"the recipe '{recipe.name}' has no compress or compare step to vary")
    kind, step = found
    others = [other for other, each in recipe.steps if each is not step]
    if others:
        note(f"of the recipe's steps only {kind} is swept, and the points are evaluated; left out: {', '.join(others)}")
    data = recipe.data
    calibrated = step.calibrated or call.calibration is not None
    own = replace(
        call,
        model=recipe.model,
        dtype=recipe.dtype,
        seed=recipe.seed,
        calibration=call.calibration or (_listed(data.calibration) if calibrated else None),
        calibration_tokens=calibration_tokens or data.calibration_tokens,
        self_generated=(data.self_generated if calibrated else 0) if self_generated is None else self_generated,
        labels=labels or (data.calibration_labels if calibrated else "data"),
        context=context or data.context,
        evaluation=call.evaluation or _listed(data.evaluation),
        evaluation_tokens=call.evaluation_tokens or data.evaluation_tokens,
    )
    if isinstance(step, CompressStep):
        passes = max(call.passes, step.passes)
        return step.policy, replace(own, sequential=call.sequential or step.sequential, passes=passes)
    return step.policy, own


def _listed(texts: str | list[str] | None) -> list[str] | None:
    return [texts] if isinstance(texts, str) else texts
