"""`distill`: train a student with a teacher in stages, with exact resume after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tdkit.support.processes import on_main_process
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tdkit_distill.data.examples import Examples, as_examples
from tdkit_distill.data.order import mixed_seed
from tdkit_distill.errors import CacheError, InterruptedRun, ResumeError, StageError, StorageError
from tdkit_distill.loop.acceleration import check_accelerator, make_accelerator, prepared
from tdkit_distill.loop.checkpoints import (
    Position,
    Saved,
    model_tensors,
    optimizer_tensors,
    read_latest,
    restore_model,
    restore_optimizer,
    write_checkpoint,
)
from tdkit_distill.loop.held_out import HeldOut, check_held_out, final_loss
from tdkit_distill.loop.loop import Loop
from tdkit_distill.loop.progress import LiveView, Log, live_view
from tdkit_distill.loop.stages import Running, Stage, read_running, read_stages
from tdkit_distill.loop.stop import Stop, stop_requests
from tdkit_distill.loop.together import from_all, in_all
from tdkit_distill.loop.trainee import STUDENT, BoundTerms, Trainee, bind, probe, training_mode
from tdkit_distill.models.calls import Call, call_model
from tdkit_distill.models.sharding import is_sharding, shard, share_weights, working_copy
from tdkit_distill.models.taps import tapped
from tdkit_distill.teachers.cache import CachedTeacher, model_digest
from tdkit_distill.teachers.live import Teacher, live_teacher

Data = Examples | Tensor | TensorDataset | Mapping[str, Tensor]


@dataclass
class Result:
    """What a run did.

    Attributes:
        history: one entry per optimizer step (stage, step, loss, terms, lr, gradient norm, tokens per
            second) and one per measurement on the held-out rows.
        steps: optimizer steps of all stages.
        tokens: positions trained on.
        held_out: mean loss on the held-out rows after the last stage; None without such rows.
        resumed_at: how many steps an earlier run had done.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    held_out: float | None = None
    resumed_at: int = 0


def distill(
    student: nn.Module,
    teacher: nn.Module | CachedTeacher | None,
    stages: Stage | Mapping[str, Any] | list[Stage | Mapping[str, Any]],
    data: Data | dict[str, Examples],
    *,
    folder: str | Path | None = None,
    held_out: Data | dict[str, Examples] | None = None,
    seed: int = 0,
    running: Running | Mapping[str, Any] | None = None,
    call: Call = call_model,
    accelerator: Any = None,
    progress: bool | None = None,
) -> Result:
    """Train `student` in place, one stage after the other.

    With a folder the run saves itself and goes on where it was when it is called again with the same
    models, data and stages: killed at any moment, it ends with the weights of an undisturbed run (bit for
    bit on a CPU). SIGTERM, and Ctrl-C once, end the step, save it and raise
    `InterruptedRun`. With several processes, an error in one of them outside of saving and reading ends that process,
    and its launcher ends the others.

    Args:
        student: any module.
        teacher: any module, run in eval and inference mode and never changed; or a cache of its logits, or None when
            no loss needs one.
        stages: `Stage` objects or their dictionary form.
        data: (count, length) token ids, a floating-point tensor, named columns, a ``TensorDataset``, `Examples`, or
            several `Examples` by name; see `as_examples`.
        folder: of checkpoints and ``log.jsonl``; None keeps nothing.
        held_out: rows with integer labels to measure on and never train on, or several `Examples` by name. The first
            ones choose the best weights for stages with ``keep="best"``.
        seed: of the order of rows, dropout, masking and projections.
        running: precision, device, compilation, checkpoints; see `Running`.
        call: how to run a model on a batch, ``(model, batch) -> output``.
        accelerator: an ``accelerate.Accelerator`` of your own, with its plugins; one is made when None.

    Raises:
        StageError: for malformed stages or options, a layer map that matches nothing, or a device, precision or
            tracker that is not there.
        VocabularyError: when the models' logits differ in size.
        NotFiniteError: when a term turns NaN or infinite; the step is not taken.
        ResumeError, StorageError, InterruptedRun: see there.
    """
    chosen = read_running(running)
    read = read_stages(stages)
    sets = _data_sets(data, student)
    place = None if folder is None else Path(folder)
    for stage in read:  # everything that can fail early does
        bind(stage, student, teacher)
        _examples_of(stage, sets)
    if isinstance(teacher, CachedTeacher):
        _check_cache(teacher, read, sets)
    engine = accelerator or make_accelerator(chosen, place, read)
    check_accelerator(engine, chosen)
    aside = {} if held_out is None else _data_sets(held_out, student)
    check_held_out(aside, read)
    run = _Run(student, teacher, read, sets, place, aside, seed, chosen, call, engine)
    with ExitStack() as stack:
        devices = [engine.device] if engine.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        view = stack.enter_context(live_view(progress if engine.is_main_process else False))
        stop = stack.enter_context(stop_requests(view.say))
        return run.go(view, stop)


def _data_sets(data: Any, student: nn.Module) -> dict[str, Examples]:
    if isinstance(data, Mapping) and data and all(isinstance(value, Examples) for value in data.values()):
        return dict(data)
    return {"": as_examples(data, student)}


def _examples_of(stage: Stage, sets: dict[str, Examples]) -> Examples:
    if stage.data is None and len(sets) == 1:
        return next(iter(sets.values()))
    if stage.data not in sets:
        raise StageError(f"stage '{stage.name}': data '{stage.data}' is none of {', '.join(map(repr, sets))}")
    return sets[stage.data]


def _check_cache(teacher: CachedTeacher, stages: list[Stage], sets: dict[str, Examples]) -> None:
    for stage in stages:
        if _examples_of(stage, sets).fingerprint != teacher.data:
            raise CacheError(
                f"stage '{stage.name}': {teacher.folder} was computed on other rows: build a cache for this data"
            )


@dataclass
class _Run:
    student: nn.Module
    teacher: nn.Module | CachedTeacher | None
    stages: list[Stage]
    sets: dict[str, Examples]
    folder: Path | None
    held_out: dict[str, Examples]
    seed: int
    running: Running
    call: Call
    engine: Any  # accelerate.Accelerator

    def go(self, view: LiveView, stop: Stop) -> Result:
        for model in (self.student, self.teacher):
            if isinstance(model, nn.Module):
                share_weights(model, self.engine)
        self.identity = self._identity() if self.folder else ""
        saved = in_all(self.engine, self._latest)
        position = saved.position if saved else Position()
        self._check_position(position)
        result = Result(resumed_at=position.total)
        self.log = Log(None, position.total)
        on_main_process(lambda: self._open_log(position.total))
        tracked = bool(self.running.trackers)
        self.held = HeldOut(self.held_out, self.engine, self.log, self.folder, self.identity, self.seed, tracked)
        if self.running.trackers:
            config = {"stages": json.dumps([stage.model_dump() for stage in self.stages])}
            in_all(self.engine, lambda: self.engine.init_trackers("tdkit-distill", config))
        try:
            if saved:
                view.say(f"going on after {position.total} steps ({saved.folder})")
                restore_model(self.student, _student_part(saved.model))
            for number in range(position.stage, len(self.stages)):
                position = self._stage(number, position, saved, view, stop)
                saved = None
        finally:
            self.log.close()
            if self.running.trackers:
                self.engine.end_training()
        result.history = self.log.entries
        result.steps = position.total
        result.tokens = position.tokens
        result.held_out = final_loss(self.log, self.stages)
        return result

    def _latest(self) -> Saved | None:
        return read_latest(self.folder, self.identity) if self.folder else None

    def _check_position(self, position: Position) -> None:
        """All processes must have found the same checkpoint."""
        totals = from_all(self.engine, position.total)
        if len(set(totals)) > 1:
            raise ResumeError(
                f"{self.folder} holds checkpoints after {' and '.join(map(str, sorted(set(totals))))} steps for the "
                "processes of this run: give a folder on a file system that all of them share"
            )

    def _open_log(self, total: int) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log = Log(self.folder, total)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"the run's folder {self.folder} cannot be written ({error}): give another one"
            ) from error

    def _identity(self) -> str:
        teacher = self.teacher
        form = {
            "stages": [stage.model_dump(mode="json") for stage in self.stages],
            "data": {name: examples.fingerprint for name, examples in self.sets.items()},
            "student": model_digest(self.student),
            "teacher": (
                None
                if teacher is None
                else str(teacher.folder)
                if isinstance(teacher, CachedTeacher)
                else model_digest(teacher)
            ),
            "seed": self.seed,
            "precision": self.running.precision,
            "processes": self.engine.num_processes,
        }
        if any(stage.keep == "best" for stage in self.stages):  # then the measurements choose the weights
            form["held_out"] = {name: examples.fingerprint for name, examples in self.held_out.items()}
            form["evaluate_every"] = self.running.evaluate_every
        return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()

    def _stage(self, number: int, position: Position, saved: Saved | None, view: LiveView, stop: Stop) -> Position:
        stage, examples = self.stages[number], _examples_of(self.stages[number], self.sets)
        steps = stage.step_count(examples.length)
        self._check_batch(stage)
        with ExitStack() as stack:
            student = stack.enter_context(working_copy(self.student, self.engine))
            bound = bind(stage, student, self.teacher)
            teacher = self._teacher(bound, stack) if bound.need_teacher else None
            self._probe(student, bound, teacher, examples, mixed_seed(self.seed, "probe", number))
            trainable = stack.enter_context(training_mode(student, stage, self.running))
            record = stack.enter_context(
                tapped(student, bound.gather("student_outputs"), bound.gather("student_attention"))
            )
            trainee = Trainee(student, list(bound.terms), record, self.call)
            model, optimizer, wrapped = prepared(self.engine, trainee, trainable, stage)
            stack.callback(self.engine.free_memory)
            if saved and position.step:
                restore_model(trainee, saved.model)
                restore_optimizer(trainee, optimizer, saved.optimizer)
                if saved.scaler and self.engine.scaler is not None:
                    self.engine.scaler.load_state_dict(saved.scaler)
            loop = Loop(
                self.engine, self.log, self.seed, self.running, self.folder, number, stage, examples, bound, teacher
            )
            loop.attach(model, wrapped)
            view.stage(f"{stage.name} {number + 1}/{len(self.stages)}", steps, position.step)
            held = self.held
            held.begin(stage, position, trainee, view)
            stopping = False
            for step in range(position.step, steps):
                terms, speed, stopping = loop.step(step, steps, position.total + 1, stop)
                tokens = position.tokens + stage.batch_size * examples.length
                position = Position(number, step + 1, position.total + 1, tokens)
                view.step(terms, speed)
                every = self.running.evaluate_every
                if every and (step + 1) % every == 0 and step + 1 < steps:
                    held.measure(position, trainee, view)
                    if held.gets_no_better:
                        view.say(f"{stage.name}: ended after {position.total} steps, which were no better than before")
                        break
                due = self.running.checkpoint_every is not None and (step + 1) % self.running.checkpoint_every == 0
                if step + 1 < steps and (due or stopping):
                    self._save(position, trainee, optimizer)
                if stopping and step + 1 < steps:
                    held.take_best(position, trainee, view)
                    self._interrupted(position, stop)
            held.measure(position, trainee, view)
            held.take_best(position, trainee, view)
            position = Position(number + 1, 0, position.total, position.tokens)
            self._save(position, trainee, None)
            if stopping and number + 1 < len(self.stages):
                self._interrupted(position, stop)
        return position

    def _check_batch(self, stage: Stage) -> None:
        parts = stage.accumulation * self.engine.num_processes
        if stage.batch_size % parts:
            raise StageError(
                f"stage '{stage.name}': batch_size {stage.batch_size} does not divide into {stage.accumulation} "
                f"accumulated parts on {self.engine.num_processes} processes: make it a multiple of {parts}"
            )

    def _probe(
        self, student: nn.Module, bound: BoundTerms, teacher: Teacher | None, examples: Examples, seed: int
    ) -> None:
        with self._asked(student, bound.gather("student_outputs"), bound.gather("student_attention")) as asked:
            probe(bound.terms, asked, teacher, examples, seed, self.engine.device)

    def _asked(
        self,
        model: nn.Module,
        outputs: tuple[str, ...],
        attention: tuple[str, ...],
        dtype: torch.dtype | None = None,
        at: str | None = None,
    ) -> AbstractContextManager[Teacher]:
        """A model that is only run forward: sharded where the accelerator shards, unless it has a device of its own."""
        cut = partial(shard, engine=self.engine, training=False) if is_sharding(self.engine) and at is None else None
        device = self.engine.device
        return live_teacher(
            model,
            outputs=outputs,
            attention=attention,
            dtype=dtype,
            at=at or device,
            device=device,
            call=self.call,
            cut=cut,
        )

    def _teacher(self, bound: BoundTerms, stack: ExitStack) -> Teacher:
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher
        assert self.teacher is not None
        name = self.running.teacher_dtype
        dtype = None if name is None else getattr(torch, name)
        outputs, attention = bound.gather("teacher_outputs"), bound.gather("teacher_attention")
        return stack.enter_context(self._asked(self.teacher, outputs, attention, dtype, self.running.teacher_device))

    def _save(self, position: Position, trainee: Trainee, optimizer: torch.optim.Optimizer | None) -> None:
        if self.folder is None:
            return
        main = self.engine.is_main_process
        model = model_tensors(trainee, keep=main)  # all processes gather, one of them keeps and writes
        moments = optimizer_tensors(trainee, optimizer, keep=main) if optimizer else {}
        write = partial(
            write_checkpoint,
            self.folder,
            position,
            run=self.identity,
            model=model if optimizer else {n: t for n, t in model.items() if n.startswith(STUDENT)},
            optimizer=moments,
            scaler=self.engine.scaler.state_dict() if self.engine.scaler is not None else {},
            keep=self.running.keep,
        )
        on_main_process(write)

    def _interrupted(self, position: Position, stop: Stop) -> None:
        where = (
            f"a checkpoint is in {self.folder}; run again to go on" if self.folder else "nothing was kept: no folder"
        )
        raise InterruptedRun(
            f"stopped by {stop.signal or 'a signal to another process'} after {position.total} steps; {where}",
            self.log.entries,
        )


def _student_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(STUDENT): t for name, t in tensors.items() if name.startswith(STUDENT)}
