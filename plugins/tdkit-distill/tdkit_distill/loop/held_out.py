"""What a stage measures on rows that are never trained on, its best weights by that, and when it gets no better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tdkit.support.processes import on_main_process
from torch import Tensor

from tdkit_distill.data.examples import Examples, labels_of
from tdkit_distill.errors import StageError
from tdkit_distill.loop.checkpoints import Position, put_back, read_best, trained_tensors, write_best
from tdkit_distill.loop.measure import held_out_loss
from tdkit_distill.loop.progress import LiveView, Log
from tdkit_distill.loop.stages import Stage
from tdkit_distill.loop.together import from_all
from tdkit_distill.loop.trainee import Trainee
from tdkit_distill.models.sharding import is_sharding, reshard


class HeldOut:
    """Measures a student on held-out rows, and keeps its best weights for stages that ask for them.

    Args:
        sets: the rows by name; the first ones choose the best weights.
        engine: an ``accelerate.Accelerator``.
        folder: of the run; the best weights are kept in memory when None.
        run: identifies the run, as in checkpoints.
        tracked: whether trackers are given the losses.
    """

    def __init__(
        self,
        sets: Mapping[str, Examples],
        engine: Any,
        log: Log,
        folder: Path | None,
        run: str,
        seed: int,
        tracked: bool,
    ) -> None:
        self.sets = sets
        self.engine = engine
        self.log = log
        self.folder = folder
        self.run = run
        self.seed = seed
        self.tracked = tracked
        self._losses: dict[int, float] = {}  # of the first rows in this stage, by the steps of the run
        self._kept: dict[str, Tensor] = {}

    def begin(self, stage: Stage, position: Position, trainee: Trainee, view: LiveView) -> None:
        """Start a stage, or go on in one."""
        self.stage, self.number = stage, position.stage
        self._kept = {}
        self._losses = from_all(self.engine, _losses_of(self.log.entries, self.number))[0]
        if stage.keep == "best" and not self._losses:
            self.measure(position, trainee, view)

    def measure(self, position: Position, trainee: Trainee, view: LiveView) -> None:
        """Measure the student, unless that was done after the same step; keep its weights if they are the best."""
        if not self.sets or position.total in self._losses:
            return
        found = {name: self._loss(trainee, rows) for name, rows in self.sets.items()}
        if is_sharding(self.engine):
            reshard(trainee)
        found = from_all(self.engine, found)[0]  # one process decides for all
        first, *others = found
        loss = found[first]
        if self.stage.keep == "best" and (not self._losses or loss < self._losses[self._best()]):
            self._keep(position, trainee)
        self._losses[position.total] = loss
        entry = {"stage": self.stage.name, "number": self.number, "total": position.total, "tokens": position.tokens}
        entry |= {"held_out": loss} | ({"others": {name: found[name] for name in others}} if others else {})
        self.log.add(entry)
        if self.tracked:
            self.engine.log({f"held_out/{name or 'loss'}": value for name, value in found.items()}, step=position.total)
        told = "".join(f", {name} {_perplexity(found[name]):.2f}" for name in others)
        view.say(
            f"{self.stage.name}: held-out loss {loss:.4f} (perplexity {_perplexity(loss):.2f}{told}) after "
            f"{position.total} steps"
        )

    @property
    def gets_no_better(self) -> bool:
        """Whether the stage has measured as often as its patience allows since its best weights."""
        if self.stage.patience is None:
            return False
        return len([total for total in self._losses if total > self._best()]) >= self.stage.patience

    def take_best(self, position: Position, trainee: Trainee, view: LiveView) -> None:
        """Put the stage's best weights into the student, if it keeps these and has others now."""
        if self.stage.keep != "best" or self._best() == position.total:
            return
        best = self._best()
        put_back(trainee, read_best(self.folder, self.number, best) if self.folder else self._kept)
        view.say(f"{self.stage.name}: took the best weights, those after {best} steps")

    def _loss(self, trainee: Trainee, rows: Examples) -> float:
        size = max(1, self.stage.batch_size // self.stage.accumulation)
        with self.engine.autocast():
            return held_out_loss(trainee, rows, self.engine.device, batch=size, seed=self.seed)

    def _best(self) -> int:
        return best_of(self._losses)

    def _keep(self, position: Position, trainee: Trainee) -> None:
        tensors = trained_tensors(trainee, keep=self.folder is None or self.engine.is_main_process)
        if self.folder is None:
            self._kept = tensors
        else:
            folder = self.folder
            on_main_process(lambda: write_best(folder, position, run=self.run, model=tensors))


def best_of(losses: Mapping[int, float]) -> int:
    """The number of steps after which the loss was lowest; the first such. NaN is above all others."""
    return min(losses, key=lambda total: math.inf if math.isnan(losses[total]) else losses[total])


def final_loss(log: Log, stages: list[Stage]) -> float | None:
    """The loss on the first held-out rows of the weights that the last stage has ended with; None without rows."""
    losses = _losses_of(log.entries, len(stages) - 1)
    if not losses:
        return None
    return losses[best_of(losses) if stages[-1].keep == "best" else max(losses)]


def check_held_out(sets: Mapping[str, Examples], stages: list[Stage]) -> None:
    """Refuse rows whose loss cannot be measured, and stages that need rows where there are none.

    Raises:
        StageError: in these cases.
    """
    for name, rows in sets.items():
        labels = labels_of(rows.batch(torch.tensor([0]), torch.Generator()))
        if labels is None or labels.is_floating_point():
            raise StageError(
                f"held_out{f' {name!r}' if name else ''}: these rows have "
                f"{'no' if labels is None else 'floating-point'} labels, and their loss is "
                "measured by integer ones: add a column of that name, or leave held_out out and compare the models "
                "afterwards, by tdkit.evaluation.agreement"
            )
    for stage in stages:
        if stage.keep == "best" and not sets:
            raise StageError(f"stage '{stage.name}': keep='best' is measured on held-out rows: pass held_out=")


def _losses_of(entries: list[dict[str, Any]], number: int) -> dict[int, float]:
    return {
        entry["total"]: entry["held_out"] for entry in entries if "held_out" in entry and entry.get("number") == number
    }


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
