"""Measure any model on batches: accuracy or squared error by their labels, and agreement with the dense model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from tdkit.calibration.batches import Batch, Call
from tdkit.errors import EvaluationError
from tdkit.evaluation.comparison import agreement
from tdkit.evaluation.reports import DatasetIdentity, Figure, ProtocolReport, Result
from tdkit.evaluation.running import call_in
from tdkit.evaluation.scoring import score
from tdkit.models.sites import num_params
from tdkit.sources.source import Source
from tdkit.support.compatibility import tree_leaves

Metric = Literal["accuracy", "mse"]
HIGHER_IS_BETTER = ("accuracy", "agreement")  # of the figures; of the others less is better


def measure_batches(
    source: Source,
    batches: Iterable[Batch],
    name: str,
    *,
    metric: Metric | None = None,
    dense: nn.Module | None = None,
    progress: bool | None = None,
) -> Result:
    """Measure a model on batches of any kind.

    Args:
        source: the model.
        batches: as in `tdkit.calibrate`; they are gone through several times.
        name: of the data, for the report; the path of a file has its SHA-256 there.
        metric: "accuracy" or "mse", as in `score`; when None, by the labels: accuracy of integers, the mean squared
            error of floating-point numbers, neither without labels.
        dense: the model before, which is measured too, and compared with by `agreement`.
        progress: show a progress bar; when None, only on a terminal.

    Returns:
        The result, with the figures "accuracy" or "mse" and, against a dense model, "dense accuracy" or "dense mse",
        "agreement" (`Agreement.top1`, of logits), "relative error" and "ratio", params / params of the dense model.

    Raises:
        EvaluationError: when there is nothing to measure by, or as in `score` and `agreement`.
    """
    count, examples, labels, digest = 0, 0, None, hashlib.sha256()
    for number, batch in enumerate(batches):
        call = call_in(source.model, batch, number)
        count, examples = number + 1, examples + call.examples
        labels = call.labels if labels is None else labels
        _add(digest, call)
    chosen = metric or _metric_of(labels)
    if chosen is None and dense is None:
        raise EvaluationError(
            f"{name} holds no labels to measure by: add them, or compare with the dense model (--against)"
        )
    figures: dict[str, Figure] = {}
    if chosen is not None:
        figures[chosen] = Figure(value=score(source.model, batches, chosen, progress=progress))
    if dense is not None:
        if chosen is not None:
            figures[f"dense {chosen}"] = Figure(value=score(dense, batches, chosen, progress=progress))
        figures |= agreement_figures(source.model, dense, batches, progress=progress)
    return Result(
        task=name,
        dataset=_dataset(name),
        protocol=ProtocolReport(
            name="batches", description="means over all examples of the batches", context=None, windows=count
        ),
        tokens=examples,
        tokens_sha256=digest.hexdigest(),
        figures=figures,
    )


def has_labels(model: nn.Module, batches: Iterable[Batch], name: str) -> bool:
    """Returns whether the first of the batches has labels that a model can be measured by.

    Raises:
        EvaluationError: when there are no batches, or the model does not take the first.
    """
    for batch in batches:
        return _metric_of(call_in(model, batch, 0).labels) is not None
    raise EvaluationError(f"{name} holds no batches")


def quality(source: Source, batches: Iterable[Batch], name: str, dense: nn.Module | None) -> dict[str, float]:
    """Returns "accuracy" or "mse" of a model on batches with labels; on others "agreement" and "relative error".

    Args:
        source: the model.
        batches, name: as in `measure_batches`.
        dense: the model before, which the model is compared with where there are no labels; also the model itself.

    Raises:
        EvaluationError: as `measure_batches`.
    """
    if has_labels(source.model, batches, name):
        dense = None
    elif dense is source.model:  # which agrees with itself, by the figures that its outputs have
        dense = copy.deepcopy(dense)
    found = measure_batches(source, batches, name, dense=dense).figures
    return {figure: value.value for figure, value in found.items() if figure != "ratio"}


def agreement_figures(
    model: nn.Module, dense: nn.Module, batches: Iterable[Batch], *, progress: bool | None = None
) -> dict[str, Figure]:
    """Returns the figures of a comparison with the dense model; see `measure_batches`."""
    found = agreement(model, dense, batches, progress=progress)
    figures = {} if found.top1 is None else {"agreement": Figure(value=found.top1)}
    figures["relative error"] = Figure(value=found.relative_error)
    figures["ratio"] = Figure(value=num_params(model) / num_params(dense))
    return figures


def _metric_of(labels: object) -> Metric | None:
    if not isinstance(labels, Tensor):
        return None
    return "mse" if labels.is_floating_point() else "accuracy"


def _add(digest: hashlib._Hash, call: Call) -> None:
    """Add the dtypes, shapes and bytes of the tensors of a batch."""
    for leaf in tree_leaves((call.args, call.kwargs, None if call.passed else call.labels)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}\n".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _dataset(name: str) -> DatasetIdentity | None:
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return DatasetIdentity(name=name, sha256=digest.hexdigest())
