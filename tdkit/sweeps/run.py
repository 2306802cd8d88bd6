"""A sweep in steps, so that several processes can take part in it."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.batches import Batch, digest_of
from tdkit.calibration.calibration import Calibration, Loss
from tdkit.calibration.losses import Labels
from tdkit.calibration.measure import measured, text_batches
from tdkit.calibration.runner import Runner
from tdkit.compression.apply import compress_resolved
from tdkit.errors import CalibrationError, CheckpointError, OptionError, PolicyError, TdkitError
from tdkit.models.checkpoint.description import digest
from tdkit.models.sites import Site
from tdkit.planning.planner import planned
from tdkit.planning.resolution import resolve
from tdkit.records.before import Before, sizes_of
from tdkit.records.record import Data, Figures, Record, Sample
from tdkit.support.claims import claimed, shared_by_claims
from tdkit.support.documents import read_json
from tdkit.support.files import write_text
from tdkit.sweeps.folder import Folder
from tdkit.sweeps.grid import Point
from tdkit.sweeps.tracking import Tracking

Measure = Callable[[nn.Module], Mapping[str, float]]
Continue = Callable[[nn.Module], Sequence[Sample]]


class Sweep:
    """A sweep in steps: `prepare`, then `points_as_done` in one process or in several, then `finish`.

    Args:
        model: as in `sweep`.
        points: what is to be done.
        calibration, loss, measure, higher_is_better, sequential, passes, device, log_with, progress: as in `sweep`.
        labels, gradients: as in `tdkit.calibrate`, for batches.
        samples: a function model -> texts that it continued, with the dense model's left empty; see `Record`.
        folder: as in `sweep`.
        source: the name of the model for its records.
        seed: of random generators, for the records.
        command: the command line, for the records.
        data: the texts, for the records.
        conditions: what the points depend on that cannot be seen in the other arguments, such as the text that
            `measure` reads; JSON-able.
        told: what else is kept in the folder, for the report.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[Point],
        *,
        calibration: Calibration | Iterable[Batch] | str | Path | None = None,
        loss: Loss | None = None,
        labels: Labels = "data",
        gradients: bool = True,
        measure: Measure | None = None,
        samples: Continue | None = None,
        higher_is_better: Sequence[str] = (),
        sequential: bool = False,
        passes: int = 1,
        folder: Path | None = None,
        device: torch.device | str | None = None,
        log_with: Sequence[str] = (),
        progress: bool | None = None,
        source: str | None = None,
        seed: int | None = None,
        command: str | None = None,
        data: Sequence[Data] = (),
        conditions: Mapping[str, Any] | None = None,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        if calibration is None and (sequential or passes > 1):
            asked = "sequential=True" if sequential else f"passes={passes}"
            raise CalibrationError(f"sweep: {asked} needs calibration=")
        self.model = model
        self.points = list(points)
        self.calibration = calibration
        self.loss = loss
        self.labels = labels
        self.gradients = gradients
        self.measure = measure
        self.samples = samples
        self.higher_is_better = tuple(higher_is_better)
        self.sequential = sequential
        self.passes = passes
        self.folder = None if folder is None else Folder(folder)
        self.device = device
        self.progress = progress
        self.source = source or type(model).__name__
        self.seed = seed
        self.command = command
        self.data = tuple(data)
        self.conditions = dict(conditions or {})
        self.told = dict(told or {})
        self.tracking = Tracking(log_with, folder)
        self.dense: Figures = {}
        self.known: Calibration | None = None
        self._done: dict[str, Record] = {}  # without a folder
        self._continued: list[str | None] | None = None  # by the dense model

    def prepare(self, *, overwrite: bool = False) -> None:
        """Check every point, calibrate, and measure the dense model; what an earlier call has done is read.

        Raises:
            PolicyError, CalibrationError, CheckpointError: as `sweep`.
        """
        sites = self._sites()
        if self.calibration is not None and not isinstance(self.calibration, Calibration | str | Path):
            self.calibration = list(self.calibration)
        if self.folder is not None:
            self.folder.check(overwrite)
            self.folder.begin(self._job(), self.told)
            if all(self.folder.done(point) for point in self.points):
                return
        self.known = self._calibrated(sites)
        self.dense = self._measured_dense()

    def points_as_done(self) -> Iterator[tuple[str, Record]]:
        """Iterate over the names and the records of the points as they get done, by this or another process."""
        for number, point in enumerate(self._points()):
            record = self._done[point.name] if self.folder is None else self.folder.done(point)
            assert record is not None
            self.tracking.log(number, flat(point, record))
            yield point.name, record

    def finish(self) -> None:
        """Remove what only unfinished points need."""
        self.tracking.close()
        if self.folder is not None:
            self.folder.finish()

    def _points(self) -> Iterator[Point]:
        if self.folder is None:
            for point in self.points:
                self._done[point.name] = self._record(point)
                yield point
            return
        folder = self.folder
        place = folder.file

        def work(point: Point) -> None:
            self._record(point).save(place(point))

        yield from shared_by_claims(self.points, place, work, over=lambda: False)

    def _record(self, point: Point) -> Record:
        """Returns the record of a point, which is done now, or of its failure."""
        model = copy.deepcopy(self.model)
        options = {"sequential": self.sequential, "passes": self.passes, **point.varied}
        try:
            resolved = resolve(model, point.policy)
            started = time.perf_counter()
            plan = planned(resolved, self.known, progress=self.progress)
            seconds = {"plan": time.perf_counter() - started}
            before = Before.of(resolved, plan, self.known)
            started = time.perf_counter()
            compress_resolved(
                resolved.following(plan) if self.passes == 1 else resolved,
                self.known,
                sequential=self.sequential,
                passes=self.passes,
                device=self.device,
                progress=self.progress,
            )
            seconds["fit"] = time.perf_counter() - started
        except TdkitError as error:
            return Record(
                name=point.name,
                model=self.source,
                class_name=type(model).__name__,
                policy=point.policy.to_dict(),
                options=options,
                seed=self.seed,
                command=self.command,
                data=self.data,
                dense=self.dense,
                higher_is_better=self.higher_is_better,
                failure=str(error),
            )
        return before.record(
            model,
            name=point.name,
            source=self.source,
            policy=point.policy,
            options=options,
            seed=self.seed,
            command=self.command,
            data=self.data,
            dense=self.dense,
            compressed=_numbers(self.measure, model),
            higher_is_better=self.higher_is_better,
            samples=self._samples(model),
            seconds=seconds,
        )

    def _samples(self, model: nn.Module) -> list[Sample]:
        if self.samples is None:
            return []
        if self._continued is None:
            self._continued = [sample.compressed for sample in self.samples(self.model)]
        return [replace(each, dense=text) for each, text in zip(self.samples(model), self._continued, strict=True)]

    def _sites(self) -> list[Site]:
        """Returns the weights that any of the points rewrites.

        Raises:
            PolicyError: when a policy does not fit the model; the faults of all points are named.
        """
        sites: dict[str, Site] = {}
        faults = []
        for point in self.points:
            try:
                sites |= {site.name: site for site in resolve(self.model, point.policy).rewritten}
            except TdkitError as error:
                faults.append(f"{point.name}: {error}")
        if faults:
            raise PolicyError("\n".join(faults))
        return list(sites.values())

    def _job(self) -> dict[str, Any]:
        """Returns what every point depends on."""
        return {
            "model": digest({n: t for n, t in self.model.state_dict().items() if isinstance(t, Tensor)}),
            "calibration": _digest(self.calibration),
            "options": {
                "sequential": self.sequential,
                "passes": self.passes,
                "labels": self.labels,
                "gradients": self.gradients,
            },
            "conditions": self.conditions,
        }

    def _calibrated(self, sites: Sequence[Site]) -> Calibration | None:
        given = self.calibration
        if given is None or not sites:
            return None
        if isinstance(given, Calibration):
            return given if self.folder is None else given.with_curves(self.folder.curves)
        batches = text_batches(given, None) if isinstance(given, str | Path) else given
        runner = Runner(self.model, gradients=self.gradients, loss=self.loss, labels=self.labels)
        if self.folder is None:
            return measured(runner, sites, batches, device=self.device, progress=self.progress)
        place = self.folder.work / f"moments-{_digest([site.name for site in sites])[:16]}"
        with claimed(self.folder.work / f"{place.name}.lock", wait=True):
            if place.exists():
                known = Calibration.load(place)
                known.batches, known.loss = list(batches), self.loss
            else:
                known = measured(runner, sites, batches, device=self.device, progress=self.progress)
                known.save(place)
        return known.with_curves(self.folder.curves)

    def _measured_dense(self) -> Figures:
        if self.folder is None:
            return {**sizes_of(self.model), **_numbers(self.measure, self.model)}
        file = self.folder.work / "dense.json"
        with claimed(self.folder.work / "dense.lock", wait=True):
            if not file.exists():
                write_text(file, json.dumps({**sizes_of(self.model), **_numbers(self.measure, self.model)}))
            return _kept_numbers(file)


def _numbers(measure: Measure | None, model: nn.Module) -> dict[str, float]:
    """Returns the figures of a model.

    Raises:
        OptionError: when `measure` returns something else.
    """
    with torch.no_grad():
        found = {} if measure is None else measure(model)
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (TypeError, ValueError, AttributeError):
        raise OptionError(f"sweep: measure returned {found!r}: return numbers by name, {{'accuracy': 0.9}}") from None


def _kept_numbers(file: Path) -> dict[str, float]:
    """Returns the figures in a file.

    Raises:
        CheckpointError: when it is damaged.
    """
    try:
        form = read_json(file)
        if not isinstance(form, dict) or not all(isinstance(value, int | float) for value in form.values()):
            raise ValueError("it does not hold numbers by name")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): delete it, and it is measured again") from None
    return form


def _digest(given: Any) -> str:
    """Returns a digest of a calibration: of its moments, or of the tensors of its batches and of other values."""
    if not isinstance(given, Calibration):
        return digest_of([given])
    total = hashlib.sha256()
    for name in given.names:
        metric = given.metric(name)
        sides = () if metric is None else (metric.input, metric.output)
        sums = [None if side is None else float(side.sum(dtype=torch.float64)) for side in sides]
        total.update(json.dumps([name, sums]).encode())
    return total.hexdigest()


def flat(point: Point, record: Record) -> dict[str, Any]:
    """Returns a record as one row of numbers and texts."""
    row: dict[str, Any] = {"name": point.name, **point.varied}
    for name in ("params", "bytes"):
        after, before = record.compressed.get(name), record.dense.get(name)
        row[name] = after
        row["ratio" if name == "params" else "bytes_ratio"] = after / before if after is not None and before else None
    row |= {name: value for name, value in record.compressed.items() if name not in ("params", "bytes")}
    row |= {f"dense_{name}": value for name, value in record.dense.items()}
    return {**row, "seconds": sum(record.seconds.values()), "failure": record.failure}
