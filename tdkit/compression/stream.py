"""Compress a folder of weights layer by layer, without holding the model in memory."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tdkit.calibration.calibration import DESCRIPTION as MOMENTS
from tdkit.calibration.calibration import Calibration
from tdkit.compression.fit import fit_step
from tdkit.compression.work import Work, read_entry, write_layer
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.registered import spec_of
from tdkit.decompositions.shrink import Shrink
from tdkit.errors import BudgetError, OptionError, PolicyError, TdkitError
from tdkit.models.card import Card
from tdkit.models.checkpoint.description import Layer
from tdkit.models.checkpoint.rewriting import rewrite
from tdkit.models.checkpoint.values import values_from
from tdkit.models.checkpoint.writing import check_target, save
from tdkit.models.shards import read_tensor
from tdkit.models.sites import Site, factorized_groups
from tdkit.models.swap import swapping
from tdkit.planning.plan import Plan
from tdkit.planning.planner import planned
from tdkit.planning.policy import Policy
from tdkit.planning.resolution import Resolved, resolve, without
from tdkit.planning.step import Step
from tdkit.sources.on_disk import OpenedModel, open_model
from tdkit.support.devices import check_device
from tdkit.support.files import write_text
from tdkit.support.progress import progress_bar
from tdkit.support.workers import share_of_threads, worker_processes

PLAN = "plan.json"
CALL = "call.json"
WORKER = "import sys; from tdkit.compression.stream import _work; _work(sys.argv[1])"

_log = logging.getLogger(__name__)


def compress_folder(
    source: str | Path,
    policy: Policy | Plan,
    out: str | Path,
    *,
    calibration: Calibration | str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    workers: int = 1,
    overwrite: bool = False,
    card: bool | Card = False,
    on_plan: Callable[[Plan], object] | None = None,
    progress: bool | None = None,
) -> Path:
    """Write the folder that `tdkit.save` writes after `tdkit.compress`, with one layer in memory at a time.

    The architecture is built without weights. Each weight is read from the safetensors files of `source`, fitted,
    written and freed; all other tensors are copied. The same policy and calibration give the same factors as in memory,
    on the same number of threads.

    What is done is kept in the folder ``NAME.work`` beside `out`, which appears when all is done. A call that was
    interrupted or killed goes on there when it is repeated, and calls in other processes, also on other machines that
    share the folder, take part in the work.

    Args:
        source: a folder of a transformers model with safetensors files, or a hub name.
        policy: a policy, or a plan made from one.
        out: the folder to write; must not exist or be empty, unless `overwrite` is set and it holds an earlier save.
        calibration: a result of `calibrate`, or the folder that one was saved to, whose moments are read layer by
            layer.
        dtype: of the weights and factors; when None, that of the config of `source`.
        device: the device to fit on; the CPU when None.
        workers: the number of processes on this machine that share the layers. They divide torch's threads.
        overwrite: replace an earlier save.
        card: write a model card, as in `tdkit.save`.
        on_plan: called with the plan that is carried out, which the output folder does not hold.
        progress: show a progress bar; when None, only on a terminal.

    Returns:
        `out`.

    Raises:
        SourceError, CheckpointError: when `source` cannot be opened, `out` holds other files, or the unfinished work
            beside it is that of another call.
        PolicyError, OptionError, BudgetError, CalibrationError: as in `plan`.
    """
    out = Path(out)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise OptionError(f"compress_folder: workers={workers!r} must be an integer of at least 1")
    check_device(device)
    check_target(out, overwrite)
    opened = open_model(source, dtype=dtype)
    moments = None if calibration is None else _moments(calibration)
    resolved = resolve_on_disk(opened, policy)
    job = _Job(opened, resolved, moments, Work(out), device)
    job.work.begin(
        {
            "source": _state_of(opened.weights.shards.files, opened.folder / "config.json"),
            "policy": policy.to_dict(),
            "calibration": None if calibration is None else _state_of_moments(calibration),
            "dtype": str(opened.model.config.dtype),
        }
    )
    try:
        with _helpers(job, policy, calibration, workers):
            plan = job.run(progress)
    except (BudgetError, OptionError):  # the same call would end here again, and another one does not go on from here
        job.work.remove()
        raise
    if on_plan is not None:
        on_plan(plan)
    return job.finish(out, overwrite, card)


def resolve_on_disk(opened: OpenedModel, policy: Policy | Plan) -> Resolved:
    """Returns the resolved policy without groups of weights, which shrink together in a model that can be run.

    Raises:
        PolicyError: when a rule asks for them, or the budget for a dtype of integers; else as `resolve`.
    """
    resolved = resolve(opened.model, policy, opened.weights.weight)
    groups = {group.name for bundle in resolved.bundles.values() for group in bundle.groups}
    plan, chosen = resolved.plan, resolved.policy
    asked = [name for name in groups if isinstance(resolved.rules[name].decomposition, Shrink)]
    asked += [step.name for step in plan.rewritten if isinstance(step.decomposition, Shrink)] if plan else []
    if asked:
        raise PolicyError(
            f"shrink needs the whole model, to test that {min(asked)} shares its hidden units: load it, then compress"
        )
    target = plan.target if plan else chosen.target if chosen else None
    if target is not None and target.dtype is not None:
        raise PolicyError(
            f"the budget's dtype={target.dtype} is not for weights that are read one by one: give dtype=, and quantize "
            "the result"
        )
    return without(resolved, dict.fromkeys(groups, "weights are read one by one")) if groups else resolved


@dataclass(frozen=True)
class _Job:
    """One process's view of the work."""

    opened: OpenedModel
    resolved: Resolved
    calibration: Calibration | None
    work: Work
    device: torch.device | str | None

    def run(self, progress: bool | None) -> Plan:
        """Do all of the work but the last step, together with other processes; returns the plan."""
        calibration = self._with_curves(progress)
        plan = self._plan(calibration, progress)
        pairs = list(enumerate(self.resolved.pairs(plan)))

        def fit(item: tuple[int, tuple[Step, Site]]) -> None:
            number, (step, site) = item
            bar.now(site.name)
            metric = calibration.fit_metric(site.name) if calibration else None
            with self.opened.weights.holding(*site.users):
                matrix = fit_step(step, site, metric, self.device)
                options = [user.host.options(user.module) for user in site.users]
            assert step.decomposition is not None
            entry = {
                "names": list(site.names),
                "shape": list(matrix.sizes),
                "decomposition": spec_of(step.decomposition),
                "options": options,
                "error": matrix.error,
            }
            write_layer(self.work.layer(number), matrix, entry)

        earlier = {number for number, _ in pairs if self.work.layer(number).exists()}
        before = after = 0
        with progress_bar("fit", len(pairs), progress, work=sum(step.params_before for _, (step, _) in pairs)) as bar:
            for number, (step, _) in self.work.share(pairs, lambda item: self.work.layer(item[0]), fit):
                before, after = before + step.params_before, after + step.params_after
                bar.so_far(f"{before:,} -> {after:,} params")
                (bar.before if number in earlier else bar.advance)(1, step.params_before)
        return plan

    def finish(self, out: Path, overwrite: bool, card: bool | Card) -> Path:
        """Write the output folder from the finished layers and remove them, unless another process has done so."""
        self.work.once("saved", lambda _: self._save(out, overwrite, card))
        if self.work.is_over():
            self.work.remove()  # of the lock files that processes made that waited
        return out

    def _save(self, out: Path, overwrite: bool, card: bool | Card) -> None:
        plan = Plan.from_json((self.work.folder / PLAN).read_text(encoding="utf-8"))
        files = [self.work.layer(number) for number in range(len(plan.rewritten))]
        entries = [read_entry(path) for path in files]
        model, weights = self.opened.model, self.opened.weights
        layers = [Layer.read(entry, str(path)) for entry, path in zip(entries, files, strict=True)]
        with swapping(model) as swap:
            rewrite(swap, layers, str(self.work.folder))
        file_of = {name: path for layer, path in zip(layers, files, strict=True) for name in layer.names}
        factors = {
            id(tensor): (file_of[users[0].name], name)
            for matrix, users in factorized_groups(model)
            for name, tensor in matrix.state_dict(keep_vars=True).items()
        }

        def value(tensor: Tensor) -> Tensor:
            return read_tensor(*factors[id(tensor)]) if id(tensor) in factors else weights.read(tensor)

        state = model.state_dict(keep_vars=True).items()
        values = {name: partial(value, tensor) for name, tensor in state if tensor.is_meta}
        with values_from(values):
            save(model, out, tokenizer=self.opened.tokenizer, overwrite=overwrite, card=card)
        self.work.remove()

    def _with_curves(self, progress: bool | None) -> Calibration | None:
        """Compute the error curves that the plan needs, which all processes share."""
        policy, known = self.resolved.policy, self.calibration
        if known is None:
            return None
        kept = known.with_curves(self.work.curves)
        if policy is None or not known.gradients or policy.allocation not in ("auto", "loss"):
            return kept
        reached = set(known.names)
        items: list[tuple[Site, Decomposition]] = [
            (open_site.site, kind)
            for open_sites in self.resolved.open.values()
            for open_site in open_sites
            if isinstance(open_site.site, Site)
            and open_site.site.name in reached
            and not (self.work.folder / PLAN).exists()
            for kind in open_site.kind.alternatives(open_site.shape)
        ]

        def draw(item: tuple[Site, Decomposition]) -> None:
            bar.now(item[0].name)
            kept.curve(*item)

        def place(item: tuple[Site, Decomposition]) -> Path:
            return self.work.curves.path(item[0].name, repr(item[1]))

        with progress_bar("error curves", len(items), progress) as bar:
            for _ in self.work.share(items, place, draw):
                bar.advance()
        return kept

    def _plan(self, calibration: Calibration | None, progress: bool | None) -> Plan:
        def make(path: Path) -> None:
            made = planned(self.resolved, calibration, progress=progress)
            for text in made.warnings:
                _log.warning("%s", text)
            write_text(path, made.to_json())

        path = self.work.once(PLAN, make)
        try:
            return Plan.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:  # other processes have finished everything and removed it: the same plan again
            return planned(self.resolved, self.calibration, progress=progress)


@contextmanager
def _helpers(
    job: _Job, policy: Policy | Plan, calibration: Calibration | str | Path | None, processes: int
) -> Iterator[None]:
    """Run the other workers inside the block, and wait for them at its end."""
    if processes == 1:
        yield
        return
    moments: Path | None = None
    if isinstance(calibration, Calibration):
        given = calibration
        moments = job.work.once("calibration", lambda path: _ignore(given.save(path)))
    elif calibration is not None:
        moments = Path(calibration)
    call = {
        "source": str(job.opened.folder.resolve()),
        "dtype": str(job.opened.model.config.dtype).removeprefix("torch."),
        "policy": policy.to_dict(),
        "is_plan": isinstance(policy, Plan),
        "calibration": None if moments is None else str(moments.resolve()),
        "device": None if job.device is None else str(job.device),
        "threads": share_of_threads(processes),
    }
    write_text(job.work.folder / CALL, json.dumps(call))
    warning = "a worker stopped with exit code %d; the others did its layers"
    with worker_processes(WORKER, str(job.work.folder.resolve()), processes - 1, warning):
        yield


def _work(folder: str) -> None:
    """Run one of the other workers; what goes wrong in a layer is told by the process that started it."""
    place = Path(folder)
    call = json.loads((place / CALL).read_text(encoding="utf-8"))
    torch.set_num_threads(call["threads"])
    policy = Plan.from_dict(call["policy"]) if call["is_plan"] else Policy.from_dict(call["policy"])
    try:
        opened = open_model(call["source"], dtype=getattr(torch, call["dtype"]))
        resolved = resolve_on_disk(opened, policy)
        moments = None if call["calibration"] is None else Calibration.load(call["calibration"])
        out = place.with_name(place.name.removesuffix(".work"))
        _Job(opened, resolved, moments, Work(out), call["device"]).run(progress=False)
    except (TdkitError, KeyboardInterrupt):
        sys.exit(1)


def _moments(calibration: Calibration | str | Path) -> Calibration:
    return calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)


def _ignore(_: object) -> None:
    return None


def _state_of(files: Iterable[Path], *others: Path) -> str:
    """Returns a digest of names, sizes and times of the last change of files."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in (*files, *others)]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def _state_of_moments(calibration: Calibration | str | Path) -> str:
    """Returns a digest of the moments, or of the state of the files that hold them."""
    if not isinstance(calibration, Calibration):
        return _state_of(sorted(Path(calibration).glob("*.safetensors")), Path(calibration) / MOMENTS)
    digest = hashlib.sha256()
    for name in calibration.names:
        metric = calibration.metric(name)
        for moment in () if metric is None else (metric.input, metric.output):
            digest.update(b"none" if moment is None else moment.contiguous().numpy().tobytes())
    return digest.hexdigest()
