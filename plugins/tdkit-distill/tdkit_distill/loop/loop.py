"""The optimizer steps of one stage: teacher, student, backward, update, log entry."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdkit_distill.data.examples import Examples
from tdkit_distill.data.order import Order, mixed_seed
from tdkit_distill.errors import NotFiniteError
from tdkit_distill.loop.progress import Log
from tdkit_distill.loop.stages import Running, Stage
from tdkit_distill.loop.stop import Stop
from tdkit_distill.loop.together import in_all
from tdkit_distill.loop.trainee import BoundTerms
from tdkit_distill.models.calls import to_device
from tdkit_distill.models.sharding import gathered
from tdkit_distill.models.view import View
from tdkit_distill.teachers.cache import CachedTeacher
from tdkit_distill.teachers.live import Teacher


class Loop:
    """The optimizer steps of one stage."""

    def __init__(
        self,
        engine: Any,  # accelerate.Accelerator
        log: Log,
        seed: int,
        running: Running,
        folder: Path | None,
        number: int,
        stage: Stage,
        examples: Examples,
        bound: BoundTerms,
        teacher: Teacher | None,
    ) -> None:
        self.engine = engine
        self.log = log
        self.seed = seed
        self.running = running
        self.folder = folder
        self.number = number
        self.stage = stage
        self.examples = examples
        self.bound = bound
        self.teacher = teacher
        self.order = Order(len(examples), stage.share, mixed_seed(seed, "rows", number))
        self.weights = torch.tensor(bound.weights, device=engine.device)

    def attach(self, model: Any, optimizer: Any) -> None:
        """The trainee and its optimizer, as accelerate prepared them."""
        self.model = model
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, step: int, steps: int, total: int, stop: Stop) -> tuple[dict[str, float], float, bool]:
        """One optimizer step: its mean terms, tokens per second, and whether any process was asked to stop."""
        clock = Clock(self.engine.device, self.running.timings)
        stage, engine = self.stage, self.engine
        factor = stage.schedule.factor(step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = stage.optimizer.lr * factor * group["factor"]
        rows = self.order.take(step * stage.batch_size, stage.batch_size)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, "batch", self.number, step))
        whole = self.examples.batch(rows, generator)
        sums = torch.zeros(len(self.bound.labels), device=engine.device)
        spans = self._spans()
        parts = [{name: column[span] for name, column in whole.items()} for span in spans]
        for part, (span, shares) in enumerate(zip(spans, self.bound.shares(parts, whole), strict=True)):
            batch = to_device(parts[part], engine.device)
            with clock.measure("teacher"):
                theirs = self._ask_teacher(batch, rows[span])
            torch.manual_seed(mixed_seed(self.seed, "draw", self.number, step, part, engine.process_index))
            with clock.measure("student"), self._sync(part == stage.accumulation - 1):
                with engine.autocast():  # which accelerate adds to a forward that it wraps, and not to a sharded one
                    terms = self.model(batch, theirs, [share.to(engine.device) for share in shares])
                # gradients are averaged over the processes, and the shares add up to 1 over all of them
                engine.backward((self.weights * terms).sum() * engine.num_processes)
            sums += terms.detach().float()
        flag = torch.tensor([float(stop.signal is not None)], device=engine.device)
        values = engine.reduce(torch.cat([sums, flag]), reduction="sum").tolist()
        named = dict(zip(self.bound.labels, values[:-1], strict=True))
        self._check_finite(named, total)
        with clock.measure("optimizer"):
            clip = math.inf if stage.clip is None else stage.clip
            norm = float(gathered(engine.clip_grad_norm_(self.parameters, clip)))
            if not math.isfinite(norm) and engine.scaler is None:
                raise NotFiniteError(self._not_finite("the gradient", norm, total))
            self.optimizer.step()
            self.optimizer.zero_grad()
        seconds = clock.total()
        speed = stage.batch_size * self.examples.length / seconds
        loss = sum(weight * value for weight, value in zip(self.bound.weights, named.values(), strict=True))
        entry = {
            "stage": stage.name,
            "number": self.number,
            "step": step + 1,
            "total": total,
            "loss": loss,
            "terms": named,
        }
        entry |= {"lr": stage.optimizer.lr * factor, "gradient_norm": norm, "tokens_per_second": round(speed, 1)}
        self.log.add({**entry, "seconds": clock.parts})
        if self.running.trackers:
            engine.log({"loss": loss, **{f"loss/{k}": v for k, v in named.items()}, "lr": entry["lr"]}, step=total)
        return named, speed, values[-1] > 0

    def _ask_teacher(self, batch: Mapping[str, Tensor], rows: Tensor) -> View | None:
        teacher = self.teacher
        if isinstance(teacher, CachedTeacher) and self.engine.num_processes > 1:
            # a shard that one process finds damaged is the business of all: the others would wait for its gradients
            return in_all(self.engine, lambda: teacher.view(batch, rows))
        return teacher.view(batch, rows) if teacher else None

    def _spans(self) -> list[slice]:
        """Which of a step's rows this process takes in each accumulated part."""
        size = self.stage.batch_size // (self.stage.accumulation * self.engine.num_processes)
        numbers = range(self.engine.process_index, self.stage.batch_size // size, self.engine.num_processes)
        return [slice(number * size, (number + 1) * size) for number in numbers]

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = nullcontext() if last else self.engine.no_sync(self.model)
        return context

    def _check_finite(self, terms: dict[str, float], total: int) -> None:
        for label, value in terms.items():
            if not math.isfinite(value):
                raise NotFiniteError(self._not_finite(f"loss '{label}'", value, total))

    def _not_finite(self, what: str, value: float, total: int) -> str:
        folder = self.folder
        kept = f"the last good checkpoint is in {folder}" if folder else "no folder was given, so nothing is saved"
        return (
            f"{what} is {value} at step {total} (stage '{self.stage.name}'); the step was not taken, {kept}. Lower the "
            "learning rate, warm up longer, or clip harder"
        )


class Clock:
    """Wall time of the parts of a step, in seconds; synchronises with the device only when `wait` is true."""

    def __init__(self, device: torch.device, wait: bool) -> None:
        self._device = device
        self._wait = wait and device.type == "cuda"
        self._started = time.perf_counter()
        self.parts: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        started = self._now()
        yield
        self.parts[part] = round(self.parts.get(part, 0.0) + self._now() - started, 5)

    def total(self) -> float:
        return self._now() - self._started

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
