"""The measured second moments of a model's weights: storage in memory and on disk, look-up by name, save and load."""

from __future__ import annotations

import copy
import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tdkit.calibration.batches import Batch, Weighted, unweighted
from tdkit.calibration.losses import Labels, check_labels
from tdkit.decompositions.base import Decomposition, Point
from tdkit.decompositions.shrink import Shrink
from tdkit.errors import CalibrationError, OptionError, reason_of, told_as
from tdkit.fitting.elimination import Elimination, eliminate, in_order, leverage_scores
from tdkit.fitting.metric import Metric
from tdkit.models.groups.group import Bundle, Group
from tdkit.models.shrinking import problem_of
from tdkit.models.sites import Site
from tdkit.support.documents import read_json
from tdkit.support.files import digest_of_file, temporary_folder, whole_folder

FORMAT = "tdkit-calibration"
FORMAT_VERSION = 3  # 1 had no digests, 2 no weights of batches

DESCRIPTION = "calibration.json"

SHRINKAGE = 0.25  # SmolLM2, 4,096 tokens, joint plan at 90% of the model: perplexity 27.5 without, 24.0 with it
MOST_SHRINKAGE = 0.1  # of the diagonal
OUTPUT_SHRINKAGE = 0.1  # SmolLM2, low rank at 90%: held-out perplexity 28.64 without, 28.48 with it, 28.64 with 0.3
LEVERAGE_RIDGE = 1.0 / 16384  # of the mean over tokens; 1 for the sum over as many tokens as a calibration usually has

Loss = Callable[[Any, Batch], Tensor]

CurveKey = tuple[str, str, float, float]  # site, decomposition, and two sums that identify the weight


class Curves(Protocol):
    """Where error curves are kept: a dictionary, or files."""

    def __contains__(self, key: CurveKey, /) -> bool: ...

    def __getitem__(self, key: CurveKey, /) -> list[Point]: ...

    def __setitem__(self, key: CurveKey, points: list[Point], /) -> None: ...


class Calibration:
    """The second moments of a model's sites, by site name.

    Attributes:
        batches: the batches the moments were measured on; None when they were not kept.
        gradients: whether the second moments of the output gradients were measured as well.
        loss: the loss function that was differentiated; None for the default loss. It is not saved.
        labels: the labels of the default loss: "data", or "sampled" from the model's predictions.
        rows: by site name, the rows that the weight multiplies per token, or per example where the loss counts those;
            in a convolution the positions of its output.
        units: the tokens, or examples, that the moments were measured on; 0 where that is not known.
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
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                raise CalibrationError(f"the metric of '{name}' is a {type(metric).__name__}, not a tdkit.Metric")
        self.batches = batches
        self.gradients = gradients
        self.loss = loss
        self.labels = labels
        self.rows: dict[str, float] = {}
        self.units = 0
        self._metrics = dict(metrics)
        self._files: dict[str, Path] = {}  # site to file, for moments spilled to disk or not loaded yet
        self._curves: Curves = {}
        self._eliminations: dict[CurveKey, Elimination] = {}
        self._folder: Path | None = None  # of the spilled moments; deleted together with this object
        self._original: Calibration | None = None  # of a copy, which keeps the folder

    def add(self, metrics: Mapping[str, Metric], *, spill: bool = False) -> None:
        """Add the metrics of more sites; with `spill` they go to a temporary file, which each look-up reads."""
        if not spill:
            self._metrics |= metrics
            return
        if self._folder is None:
            self._folder = temporary_folder("calibration")
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{len(set(self._files.values())):05}.safetensors"
        _write(metrics, path)
        self._files |= dict.fromkeys(metrics, path)

    @property
    def spilled(self) -> bool:
        """Whether some metrics are on disk rather than in memory."""
        return bool(self._files)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sites that the batches reached, those in memory before those on disk."""
        return (*self._metrics, *self._files)

    def metric(self, name: str) -> Metric | None:
        """Returns the metric of the site called `name`, or None when no batch reached it.

        Raises:
            CalibrationError: when `name` is that of the parameter ``weight`` of a site, which goes by its module's.
        """
        if name in self._files:
            return _read(self._files[name], name)
        metric = self._metrics.get(name)
        module = name.removesuffix(".weight")
        if metric is None and module != name and module in self.names:
            raise CalibrationError(f"no moments are called '{name}': those of the weight of a layer are '{module}'")
        return metric

    def fit_metric(self, name: str) -> Metric | None:
        """Returns the metric that errors and fits of a site use, see `shrunk`; None when no batch reached it."""
        metric = self.metric(name)
        return None if metric is None else shrunk(metric, self.rows.get(name, 0.0) * self.units)

    def curve(self, site: Site | Bundle, kind: Decomposition) -> list[Point]:
        """Returns the error curve of `kind` for a site's weight in the site's metric; cached for later plans.

        That of a bundle of groups is the sum of the errors of their consumers.
        """
        if isinstance(site, Bundle):
            assert isinstance(kind, Shrink)
            errors = sum(self.elimination(group, kind).errors for group in site.groups)
            return kind.curve_of(site.shape, torch.as_tensor(errors))
        weight = kind.view(site.finite_weight())
        total = float(weight.sum(dtype=torch.float64))
        key = (site.name, repr(kind), total, float(torch.linalg.vector_norm(weight, dtype=torch.float64)))
        if key not in self._curves:
            metric = self.fit_metric(site.name)
            if metric is not None:
                metric.check(site.name, site.shape)
            self._curves[key] = _curve_of(kind, weight.clone(), metric, site.name)  # the model's own stays here
        return self._curves[key]

    def with_curves(self, curves: Curves) -> Calibration:
        """Returns a copy that keeps its error curves in `curves`, and uses those that are there already."""
        other = copy.copy(self)
        other._curves, other._original = curves, self
        return other

    def elimination(self, group: Group, kind: Shrink) -> Elimination:
        """Returns the order in which the units of a group are removed, and the errors; cached for later plans."""
        weight = group.consumer.site.weight.detach()
        key = (group.name, kind.by, float(weight.double().sum()), float(weight.double().square().sum()))
        if key not in self._eliminations:
            self._eliminations[key] = elimination_of(group, kind, self.fit_metric(group.name))
        return self._eliminations[key]

    def inputs_only(self) -> Calibration:
        """Returns a copy without the moments of the output gradients, so that fits weight all outputs equally."""
        known = {name: self.metric(name) for name in self.names}
        metrics = {name: Metric(metric.input) for name, metric in known.items() if metric is not None}
        inputs = Calibration(metrics, batches=self.batches, gradients=False, loss=self.loss, labels=self.labels)
        inputs.rows, inputs.units = dict(self.rows), self.units
        return inputs

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the moments, and the batches when all are tensors, to a folder: completely or not at all.

        Returns:
            The folder.

        Raises:
            CalibrationError: when the folder exists, unless `overwrite` is set and it holds a calibration.
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
            kept = [unweighted(batch) for batch in self.batches or ()]
            weights = [weight for _, weight in kept]
            if kept and all(isinstance(batch, Tensor) for batch, _ in kept):
                save_file({f"{i:06}": b.contiguous() for i, (b, _) in enumerate(kept)}, target / "batches.safetensors")
            form = {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "gradients": self.gradients,
                "labels": self.labels,
                "files": files,
                "rows": self.rows,
                "units": self.units,
                "weights": None if set(weights) <= {1.0} else weights,
                "digests": {path.name: digest_of_file(path) for path in sorted(target.glob("*.safetensors"))},
            }
            (target / DESCRIPTION).write_text(json.dumps(form, indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Returns the calibration that `save` wrote; the moments of a site are read from disk at each look-up.

        Raises:
            CalibrationError: when the folder is missing or damaged, holds no calibration, or has a newer format.
        """
        folder = Path(folder)
        form = _description_of(folder)
        try:
            names = {str(name): folder / file for file, sites in form["files"].items() for name in sites}
            gradients = bool(form["gradients"])
            labels = check_labels(form.get("labels", "data"))
            rows = {str(name): float(count) for name, count in form.get("rows", {}).items()}
            units = int(form.get("units", 0))
            if units < 0:
                raise ValueError("units are no count")
            if any(Path(file).name != file for file in form["files"]):
                raise ValueError("files are named by paths")
            if not all(math.isfinite(count) and count >= 0 for count in rows.values()):
                raise ValueError("rows are no counts")
            if form["version"] > 1:
                _check_digests(folder, dict(form["digests"]), {*form["files"]})
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            if isinstance(error, CalibrationError) and str(folder) in str(error):
                raise
            raise CalibrationError(f"{folder / DESCRIPTION} is damaged: {reason_of(error)}") from None
        for path in names.values():
            if not path.is_file():
                raise CalibrationError(f"{folder} lacks {path.name}: the copy is incomplete")
        batches = None
        if (folder / "batches.safetensors").is_file():
            with _opened(folder / "batches.safetensors") as file:
                batches = _weighted([file.get_tensor(key) for key in sorted(file.keys())], form.get("weights"), folder)
        calibration = cls({}, batches=batches, gradients=gradients, labels=labels)
        calibration._files, calibration.rows = names, rows
        calibration.units = units or sum(batch.numel() for batch in batches or ())  # version 1 and 2 had token ids only
        return calibration


def _weighted(batches: list[Tensor], weights: object, folder: Path) -> list[Batch]:
    """Returns batches with the weights that were saved, if there were any.

    Raises:
        CalibrationError: when they are not one positive number for each batch.
    """
    if weights is None:
        return batches
    if not isinstance(weights, list) or len(weights) != len(batches):
        raise CalibrationError(f"{folder / DESCRIPTION} is damaged: weights are not one number for each batch")
    return [batch if weight == 1 else Weighted(batch, weight) for batch, weight in zip(batches, weights, strict=True)]


def shrunk(metric: Metric, count: float) -> Metric:
    """Returns a metric whose moments are shrunk towards what is known before any row is seen.

    ``SHRINKAGE * in / count`` of the diagonal of C, at most `MOST_SHRINKAGE`, is added to C. That shrinks the
    correlations that few rows seem to have: columns that are removed would else be taken over by others that only look
    like them. S becomes ``(1 - r) S + r tr(S) / out I``, where r is `OUTPUT_SHRINKAGE`: what seems to be without effect
    on the loss has some elsewhere. A diagonal, a stack or a moment of an unknown number of rows stays as it is.

    Args:
        metric: as measured.
        count: the rows that C was measured on, 0 where it is not known.

    Source: shrinkage of covariances, Ledoit and Wolf (2004), section 2; the shares were measured.
    """
    inputs, outputs = metric.input, metric.output
    if not count:
        return metric
    if inputs is not None and inputs.ndim == 2:
        share = min(SHRINKAGE * len(inputs) / count, MOST_SHRINKAGE)
        inputs = inputs.clone()
        inputs.diagonal().mul_(1 + share)
    if outputs is not None and outputs.ndim == 2:
        mean = outputs.diagonal().mean()
        outputs = outputs * (1 - OUTPUT_SHRINKAGE)
        outputs.diagonal().add_(OUTPUT_SHRINKAGE * mean)
    return Metric(inputs, outputs)


def is_saved_calibration(folder: str | Path) -> bool:
    """Returns whether a folder is one that `Calibration.save` wrote."""
    return (Path(folder) / DESCRIPTION).is_file()


def _curve_of(kind: Decomposition, weight: Tensor, metric: Metric | None, name: str) -> list[Point]:
    """Returns an error curve, whoever wrote the decomposition.

    Raises:
        OptionError: when the decomposition raises something else than our errors, or its errors are not finite.
    """
    place = f"{name}: the error curve of {kind.name} ({type(kind).__module__}) failed"
    with told_as(OptionError, place, but=(MemoryError,)):
        points = kind.curve(weight, metric)
        if not all(isinstance(point, Point) and math.isfinite(point.error) for point in points):
            raise OptionError(f"{place}: its errors are not finite numbers")
    return points


def elimination_of(group: Group, kind: Shrink, metric: Metric | None) -> Elimination:
    """Eliminate the units of a group from the weight that consumes them, by the scores that `kind` names.

    Raises:
        CalibrationError: when leverage scores are asked for and the moments of the inputs are not known.
    """
    problem = problem_of(group, metric)
    if kind.by == "loss":
        return eliminate(problem.weight, problem.metric, problem.columns, heads=group.heads)
    moment = problem.metric.input
    if moment is None:
        raise CalibrationError(f"{group.name}: leverage scores need the moments of its inputs: calibrate the model")
    moment = moment.diag() if moment.ndim == 1 else moment
    scores = leverage_scores(moment, LEVERAGE_RIDGE)[problem.columns].sum(1)
    return in_order(problem.weight, problem.metric, scores.argsort(stable=True), problem.columns, heads=group.heads)


def _description_of(folder: Path) -> dict[str, Any]:
    """Returns the description of a saved calibration, of a format that this version reads.

    Raises:
        CalibrationError: when there is none.
    """
    try:
        form = read_json(folder / DESCRIPTION)
    except FileNotFoundError:
        raise CalibrationError(f"{folder} holds no {DESCRIPTION}: it is no saved calibration") from None
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{folder / DESCRIPTION} is damaged: {error}") from None
    if not isinstance(form, dict) or form.get("format") != FORMAT:
        raise CalibrationError(f"{folder / DESCRIPTION} is no description of a calibration")
    version = form.get("version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CalibrationError(
            f"{folder} has format version {version!r}, and this tdkit reads up to {FORMAT_VERSION}: update tdkit"
        )
    return form


def _check_digests(folder: Path, known: Mapping[str, str], names: set[str]) -> None:
    """Check that the files of a calibration are those that were saved.

    Raises:
        CalibrationError: when one is missing, has changed or came later.
    """
    found = {path.name: path for path in folder.glob("*.safetensors") if path.is_file()}
    lacking = sorted((names | known.keys()) - found.keys())
    if lacking:
        raise CalibrationError(f"{folder} lacks {lacking[0]}: the copy is incomplete")
    for name, path in found.items():
        if digest_of_file(path) != known.get(name):
            raise CalibrationError(
                f"{path} is not the file that was saved (its SHA-256 differs): copy it again, or calibrate again"
            )


def _write(metrics: Mapping[str, Metric], path: Path) -> None:
    tensors = {}
    for name, metric in metrics.items():
        for side, moment in (("input", metric.input), ("output", metric.output)):
            if moment is not None:
                tensors[f"{name}/{side}"] = moment.contiguous().clone()  # sites that share an input each store it
    save_file(tensors, path)


def _read(path: Path, name: str) -> Metric:
    with _opened(path) as file:
        keys = set(file.keys())
        sides = [
            file.get_tensor(f"{name}/{side}") if f"{name}/{side}" in keys else None for side in ("input", "output")
        ]
    for side in sides:
        if side is not None and not (side.is_floating_point() and bool(torch.isfinite(side).all())):
            raise CalibrationError(f"{path}: the moments of {name} hold NaN or infinite values: calibrate again")
    return Metric(*sides)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is damaged or truncated: {error}") from None
