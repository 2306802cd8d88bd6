"""Calibration: how much each layer's inputs and outputs matter to the model's loss, measured on some batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdkit.calibration.calibration import Batch, Calibration, Loss
from tdkit.calibration.losses import Labels, check_labels, token_ids
from tdkit.calibration.moments import Reach, Recorder, SharingBrokeError, groups_within, reaching
from tdkit.calibration.runner import Runner, as_it_was
from tdkit.errors import CalibrationError, did_you_mean
from tdkit.fitting.metric import Metric
from tdkit.models.sites import Site, survey
from tdkit.sources.positions import check_positions
from tdkit.sources.texts import spread_windows
from tdkit.support.devices import check_device
from tdkit.support.progress import Bar, progress_bar

LIMIT_BYTES = 8 * 2**30


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
    the sites are measured in groups, one pass each, and the finished ones are spilled to a temporary file.

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
    sites = survey(model).sites
    if names is not None:
        sites = _named(sites, names)
    if isinstance(batches, str | Path):
        batches = text_batches(batches, tokenizer, context=context, tokens=tokens)
    runner = Runner(model, gradients=gradients, loss=loss, labels=labels)
    return measured(runner, sites, batches, limit_bytes=limit_bytes, device=device, progress=progress)


def text_batches(name: str | Path, tokenizer: Any, *, context: int = 512, tokens: int = 16384) -> list[Tensor]:
    """Batches of one window of token ids (1, context) each, spread over all of a text."""
    return [row[None] for row in spread_windows(name, tokenizer, context=context, tokens=tokens)]


def _named(sites: Sequence[Site], names: Collection[str]) -> tuple[Site, ...]:
    """The sites with one of `names`.

    Raises:
        CalibrationError: for names that no site has.
    """
    if isinstance(names, str):
        raise CalibrationError(f"calibrate: names={names!r} must be a list of layer names")
    known = {name for site in sites for name in site.names}
    unknown = [f"'{name}'{did_you_mean(name, known)}" for name in names if name not in known]
    if unknown:
        raise CalibrationError(f"calibrate: no layer that can be rewritten is called {', '.join(unknown)}")
    return tuple(site for site in sites if not set(names).isdisjoint(site.names))


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
    runner = Runner(model, gradients=calibration.gradients, loss=calibration.loss, labels=calibration.labels)
    found = measured(runner, sites, calibration.batches, limit_bytes=limit_bytes, device=device, progress=progress)
    mean = runner.calibration(calibration.batches)
    for name in (name for name in calibration.names if name in found.names):
        ends = calibration.metric(name), found.metric(name)
        metric = Metric(_mean([end.input for end in ends if end]), _mean([end.output for end in ends if end]))
        mean.add({name: metric}, spill=calibration.spilled or found.spilled)
    return mean


def _mean(moments: Sequence[Tensor | None]) -> Tensor | None:
    known = [moment for moment in moments if moment is not None]
    return torch.stack(known).mean(0) if len(known) == len(moments) else None


def measured(
    runner: Runner,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    limit_bytes: int = LIMIT_BYTES,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Calibration:
    """The moments of `sites` on what `runner` makes of the batches; see `calibrate`."""
    chosen = list(batches)
    if not chosen:
        raise CalibrationError("there are no calibration batches: give at least one")
    if not sites:
        raise CalibrationError("the model has no layer that can be rewritten, so there is nothing to calibrate")
    device = check_device(device)
    _check_weights(runner)
    _check_positions(runner, chosen)
    with torch.inference_mode(False), as_it_was(runner.model, device):
        with reaching(sites) as reach, torch.no_grad():
            runner.forward(chosen[0])
        if not reach.sites:
            raise CalibrationError("the calibration batches reach no layer that can be rewritten")
        try:
            return _measure(runner, reach, chosen, limit_bytes, progress)
        except SharingBrokeError:
            return _measure(runner, Reach(reach.sites, reach.others), chosen, limit_bytes, progress)


def _check_positions(runner: Runner, batches: Sequence[Batch]) -> None:
    """Refuse windows of token ids that are longer than the model's table of positions, before anything runs."""
    for batch in batches:
        ids = token_ids(batch)
        if ids is not None and not ids.is_floating_point():
            check_positions(runner.model, ids.shape[1])


def _check_weights(runner: Runner) -> None:
    """Refuse a model that cannot be run, or not backwards.

    Raises:
        CalibrationError: naming a parameter, and what to do.
    """
    for name, parameter in runner.model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise CalibrationError(
                f"{name} is on the meta device and holds no numbers: load the model, then calibrate it"
            )
        if runner.gradients and parameter.is_inference():
            raise CalibrationError(
                f"{name} was made under torch.inference_mode(), through which no gradient can be computed: build or "
                "load the model outside of it, or calibrate with gradients=False"
            )


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
            calibration.add(recorder.metrics(), spill=len(groups) > 1)
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
