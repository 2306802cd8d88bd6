"""Calibration: how much each layer's inputs and outputs matter to the model's loss, measured on some batches."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tdkit.decompositions.base import Decomposition, Point
from tdkit.errors import CalibrationError
from tdkit.files import whole_folder
from tdkit.losses import Labels, attention_mask, check_labels, data_loss, sampled_loss
from tdkit.metric import Metric
from tdkit.moments import Reach, Recorder, SharingBrokeError, groups_within, reaching
from tdkit.progress import Bar, progress_bar
from tdkit.sites import Site, User, survey
from tdkit.sources import spread_windows

LIMIT_BYTES = 8 * 2**30
FORMAT_VERSION = 1
DESCRIPTION = "calibration.json"

Batch = Any  # whatever the model takes: a tensor, a tuple of arguments, a mapping of keyword arguments
Loss = Callable[[Any, Batch], Tensor]


class Calibration:
    """The second moments of a model's sites, by site name.

    Attributes:
        batches: what they were measured on; None when that was not kept.
        gradients: whether the moments of the output gradients are known too.
        loss: whose gradients they are; None for the cross-entropy with `labels`. It is not saved.
        labels: those of the data, or drawn from the model's predictions.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        *,
        batches: list[Batch] | None = None,
        gradients: bool = True,
        loss: Loss | None = None,
        labels: Labels = "data",
    ) -> None:
        self.batches = batches
        self.gradients = gradients
        self.loss = loss
        self.labels = labels
        self._metrics = dict(metrics)
        self._files: dict[str, Path] = {}  # moments that did not fit in memory, or were not read yet: site to file
        self._curves: dict[tuple[str, str, float, float], list[Point]] = {}
        self._folder: Path | None = None  # of moments set aside; lives as long as this object

    @property
    def names(self) -> tuple[str, ...]:
        """The sites that were reached, in the model's order."""
        return (*self._metrics, *self._files)

    def metric(self, name: str) -> Metric | None:
        """The metric of the site called `name`; None when the batches did not reach it."""
        if name in self._files:
            return _read(self._files[name], name)
        return self._metrics.get(name)

    def curve(self, site: Site, kind: Decomposition) -> list[Point]:
        """The error curve of `kind` for a site's weight in its metric; kept, so that the next plan is quick."""
        weight = site.weight.detach()
        key = (site.name, repr(kind), float(weight.double().sum()), float(weight.double().square().sum()))
        if key not in self._curves:
            self._curves[key] = kind.curve(weight, self.metric(site.name))
        return self._curves[key]

    def inputs_only(self) -> Calibration:
        """The same without the output gradients: fits weigh the layer's outputs equally."""
        known = {name: self.metric(name) for name in self.names}
        metrics = {name: Metric(metric.input) for name, metric in known.items() if metric is not None}
        return Calibration(metrics, batches=self.batches, gradients=False, loss=self.loss, labels=self.labels)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the moments, and the batches when they are tensors, to a new folder: whole or not at all.

        Raises:
            CalibrationError: when the folder exists and `overwrite` is not set, or holds other files.
        """
        folder = Path(folder)
        if folder.exists() and not (overwrite and (folder / DESCRIPTION).is_file()):
            raise CalibrationError(f"{folder} exists: give a new folder, or overwrite=True for an earlier calibration")
        with whole_folder(folder) as target:
            files: dict[str, list[str]] = {}
            for name in self.names:
                metric = self.metric(name)
                assert metric is not None
                files.setdefault(f"moments-{len(files):05}.safetensors", []).append(name)
                _write({name: metric}, target / list(files)[-1])
            keep = self.batches is not None and all(isinstance(batch, Tensor) for batch in self.batches)
            if keep and self.batches:
                save_file(
                    {f"{i:06}": b.contiguous() for i, b in enumerate(self.batches)}, target / "batches.safetensors"
                )
            form = {
                "format": "tdkit-calibration",
                "version": FORMAT_VERSION,
                "gradients": self.gradients,
                "labels": self.labels,
                "files": files,
            }
            (target / DESCRIPTION).write_text(json.dumps(form, indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """What `save` wrote; each site's moments are read when they are asked for.

        Raises:
            CalibrationError: when the folder is missing, damaged, foreign or of a newer format.
        """
        folder = Path(folder)
        try:
            form = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            version = int(form["version"])
            names = {name: folder / file for file, sites in form["files"].items() for name in sites}
            gradients = bool(form["gradients"])
            labels = check_labels(form.get("labels", "data"))
        except FileNotFoundError:
            raise CalibrationError(f"{folder} holds no {DESCRIPTION}: it is no saved calibration") from None
        except (ValueError, KeyError, TypeError, AttributeError, CalibrationError) as error:
            raise CalibrationError(f"{folder / DESCRIPTION} is damaged: {error}") from None
        if version > FORMAT_VERSION:
            raise CalibrationError(f"{folder} has format version {version}, newer than {FORMAT_VERSION}: update tdkit")
        for path in names.values():
            if not path.is_file():
                raise CalibrationError(f"{folder} lacks {path.name}: the copy is incomplete")
        batches = None
        if (folder / "batches.safetensors").is_file():
            with _opened(folder / "batches.safetensors") as file:
                batches = [file.get_tensor(key) for key in sorted(file.keys())]
        calibration = cls({}, batches=batches, gradients=gradients, labels=labels)
        calibration._files = names
        return calibration


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch] | str | Path,
    *,
    gradients: bool = True,
    names: Collection[str] | None = None,
    loss: Loss | None = None,
    labels: Labels = "data",
    tokenizer: Any = None,
    context: int = 512,
    tokens: int = 16384,
    limit_bytes: int = LIMIT_BYTES,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Measure C = E[x x^T] and S = E[g g^T] of every rewritable weight of `model`, in one pass over `batches`.

    x is what enters a layer and g the gradient of the loss at what leaves it, both per token. For an
    embedding the row side is the diagonal of token counts; a head tied to it adds its share. Sides
    longer than 16,384 (vocabularies) keep the diagonal. Where all moments together exceed `limit_bytes`,
    the sites are measured in groups, one pass each, and the finished ones wait in a temporary file.

    The model comes back as it was: its mode, its gradients and the random state included. It runs in
    eval mode.

    Args:
        batches: each is what the model takes: a tensor (of token ids), a tuple of arguments, or a mapping
            of keyword arguments (padding under ``attention_mask`` is left out). Or the name of a text, as
            `tdkit.sources.load_texts` knows it, of which windows spread over all of it are used.
        gradients: measure S too, at the cost of a backward; without it S is None.
        names: the sites to measure, by the name of any of their layers; all when None.
        loss: (model output, batch) to a scalar, summed over tokens rather than averaged, so that all
            batches count alike. None is the next-token cross-entropy of a causal language model, or the
            model's own ``loss`` where a batch holds ``labels``.
        labels: of the default loss, "data" or "sampled": drawn from what the model predicts, for which S is the
            Fisher information. It says better what a small change costs, a tenth of the parameters or less; where
            two fifths go, the data's labels have been the far better guide.
        tokenizer, context, tokens: for a text by name: what encodes it, and how much of it in which windows.
        limit_bytes: of moments held in memory at once.
        device: where to run; the model is brought back afterwards. Where it is when None.
        progress: show a progress bar; on a terminal only when None.

    Raises:
        CalibrationError: when there are no batches, no loss can be found, or it is not finite.

    Source of the two-sided moments: Martens and Grosse, K-FAC (2015), section 3; of the labels, see `sampled_loss`.
    """
    check_labels(labels)
    if loss is not None and labels != "data":
        raise CalibrationError(f"loss= has labels of its own: leave out labels={labels!r}")
    chosen = list(_text_batches(batches, tokenizer, context, tokens) if isinstance(batches, str | Path) else batches)
    if not chosen:
        raise CalibrationError("there are no calibration batches: give at least one")
    sites = tuple(site for site in survey(model).sites if names is None or not set(names).isdisjoint(site.names))
    if not sites:
        raise CalibrationError("the model has no layer that can be rewritten, so there is nothing to calibrate")
    runner = Runner(model, gradients=gradients, loss=loss, labels=labels)
    return _calibrated(runner, sites, chosen, limit_bytes, device, progress)


def recalibrate(
    model: nn.Module,
    sites: Sequence[Site],
    calibration: Calibration,
    *,
    limit_bytes: int = LIMIT_BYTES,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Calibration:
    """The mean of the moments of `calibration` and of those that `sites` have now, on the same batches.

    Where a layer has been rewritten since, what now stands in its place is measured. The loss between the dense
    model and a compressed one bends as it does at neither end alone; the mean over both ends gave SmolLM2-135M a
    lower perplexity than either.

    Raises:
        CalibrationError: when the calibration has no batches.
    """
    if calibration.batches is None:
        raise CalibrationError("the calibration was saved without its batches, so it cannot be measured again")
    users = [tuple(User(u.name, model.get_submodule(u.name), u.host) for u in site.users) for site in sites]
    now = tuple(Site(each) for each in users)
    runner = Runner(model, gradients=calibration.gradients, loss=calibration.loss, labels=calibration.labels)
    found = _calibrated(runner, now, calibration.batches, limit_bytes, device, progress)
    mean = runner.calibration(calibration.batches)
    aside = bool(calibration._files or found._files)
    for number, name in enumerate(name for name in calibration.names if name in found.names):
        ends = calibration.metric(name), found.metric(name)
        metric = Metric(_mean([end.input for end in ends if end]), _mean([end.output for end in ends if end]))
        if aside:
            _set_aside(mean, {name: metric}, number)
        else:
            mean._metrics[name] = metric
    return mean


def _mean(moments: Sequence[Tensor | None]) -> Tensor | None:
    known = [moment for moment in moments if moment is not None]
    return torch.stack(known).mean(0) if len(known) == len(moments) else None


def _calibrated(
    runner: Runner,
    sites: tuple[Site, ...],
    chosen: list[Batch],
    limit_bytes: int,
    device: torch.device | str | None,
    progress: bool | None,
) -> Calibration:
    with as_it_was(runner.model, device):
        with reaching(sites) as reach, torch.no_grad():
            runner.forward(chosen[0])
        if not reach.sites:
            raise CalibrationError("the calibration batches reach no layer that can be rewritten")
        try:
            return _measure(runner, reach, chosen, limit_bytes, progress)
        except SharingBrokeError:
            return _measure(runner, Reach(reach.sites, reach.others), chosen, limit_bytes, progress)


def _measure(
    runner: Runner,
    reach: Reach,
    batches: list[Batch],
    limit_bytes: int,
    progress: bool | None,
) -> Calibration:
    groups = groups_within(reach.sites, reach.shared, runner.gradients, limit_bytes)
    groups[0] += reach.others  # a later batch may reach them
    calibration = runner.calibration(batches)
    with progress_bar("calibrate", len(groups) * len(batches), progress) as bar:
        for number, group in enumerate(groups):
            recorder = Recorder(group, gradients=runner.gradients, shared=reach.shared)
            _pass(runner, recorder, batches, bar, f"group {number + 1} of {len(groups)}" if len(groups) > 1 else "")
            if len(groups) == 1:
                calibration._metrics = recorder.metrics()
            else:
                _set_aside(calibration, recorder.metrics(), number)
    return calibration


def _pass(runner: Runner, recorder: Recorder, batches: list[Batch], bar: Bar, label: str) -> None:
    bar.now(label)
    with recorder.attached(), torch.set_grad_enabled(runner.gradients):
        for number, batch in enumerate(batches):
            recorder.mask = runner.mask(batch)
            output = runner.forward(batch)
            if runner.gradients:
                runner.backward(output, batch, number)
            bar.advance()


def _set_aside(calibration: Calibration, metrics: dict[str, Metric], number: int) -> None:
    if calibration._folder is None:
        calibration._folder = Path(tempfile.mkdtemp(prefix="tdkit-calibration-"))
        weakref.finalize(calibration, shutil.rmtree, calibration._folder, ignore_errors=True)
    path = calibration._folder / f"{number:05}.safetensors"
    _write(metrics, path)
    calibration._files |= dict.fromkeys(metrics, path)


class Runner:
    """Runs a model on batches of whatever kind, forward and backward."""

    def __init__(self, model: nn.Module, *, gradients: bool, loss: Loss | None = None, labels: Labels = "data") -> None:
        self.model = model
        self.loss = loss
        self.labels = labels
        self.gradients = gradients

    def calibration(self, batches: list[Batch]) -> Calibration:
        """One without moments yet, that knows what they are of."""
        return Calibration({}, batches=batches, gradients=self.gradients, loss=self.loss, labels=self.labels)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def forward(self, batch: Batch) -> Any:
        batch = self._moved(batch)
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, tuple | list) else self.model(batch)

    def backward(self, output: Any, batch: Batch, number: int) -> None:
        batch = self._moved(batch)
        value = self._loss(output, batch, number)
        if value.ndim or not bool(torch.isfinite(value)):
            raise CalibrationError(
                f"the loss of calibration batch {number} is {value.tolist()!r}: it must be one finite number"
            )
        if not value.requires_grad:
            raise CalibrationError("the loss does not depend on any layer's output: check the loss function")
        value.backward()  # type: ignore[no-untyped-call]

    def _loss(self, output: Any, batch: Batch, number: int) -> Tensor:
        if self.loss is not None:
            return self.loss(output, batch)
        return data_loss(output, batch) if self.labels == "data" else sampled_loss(output, batch, seed=number)

    def mask(self, batch: Batch) -> Tensor | None:
        mask = attention_mask(batch)
        return None if mask is None else mask.to(self.device)

    def _moved(self, batch: Batch) -> Batch:
        if isinstance(batch, Tensor):
            return batch.to(self.device)
        if isinstance(batch, Mapping):
            return {key: self._moved(value) for key, value in batch.items()}
        return tuple(self._moved(value) for value in batch) if isinstance(batch, tuple | list) else batch


@contextmanager
def as_it_was(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Eval mode and frozen parameters inside; modes, gradient switches, device and random state back after."""
    modes = [(module, module.training) for module in model.modules()]
    switches = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [home.index or 0] if home.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            model.requires_grad_(False)
            if device is not None:
                model.to(device)
            yield
        finally:
            if device is not None:
                model.to(home)
            for module, training in modes:
                module.training = training
            for parameter, switch in switches:
                parameter.requires_grad_(switch)


def _text_batches(name: str | Path, tokenizer: Any, context: int, tokens: int) -> list[Tensor]:
    return [row[None] for row in spread_windows(name, tokenizer, context=context, tokens=tokens)]


def _write(metrics: Mapping[str, Metric], path: Path) -> None:
    tensors = {}
    for name, metric in metrics.items():
        for side, moment in (("input", metric.input), ("output", metric.output)):
            if moment is not None:
                tensors[f"{name}/{side}"] = moment.contiguous().clone()  # shared inputs are stored for each site
    save_file(tensors, path)


def _read(path: Path, name: str) -> Metric:
    with _opened(path) as file:
        keys = set(file.keys())
        sides = [
            file.get_tensor(f"{name}/{side}") if f"{name}/{side}" in keys else None for side in ("input", "output")
        ]
    return Metric(*sides)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is damaged or truncated: {error}") from None
