"""Calibration: measure the second moments of each layer's inputs and output gradients on batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdkit.calibration.batches import Batch, call_of, check_batches, unweighted
from tdkit.calibration.calibration import Calibration, Loss
from tdkit.calibration.losses import Labels, check_labels
from tdkit.calibration.moments import Pass, Reach, Recorder, SharingBrokeError, passes_within, reaching
from tdkit.calibration.runner import Runner, as_it_was
from tdkit.calibration.self_generated import with_self_generated
from tdkit.errors import CalibrationError, did_you_mean
from tdkit.fitting.metric import Metric
from tdkit.models.preparation import drop_caches
from tdkit.models.sites import Site, survey
from tdkit.sources.texts import spread_windows
from tdkit.support.compatibility import uncompiled
from tdkit.support.devices import check_device
from tdkit.support.progress import Bar, progress_bar

_log = logging.getLogger(__name__)

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
    self_generated: int = 0,
    limit_bytes: int = LIMIT_BYTES,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Measure C = E[x x^T] and S = E[g g^T] of every rewritable weight of `model`, in one pass over `batches`.

    x (in,) is the input of a layer and g (out,) the gradient of the loss with respect to its output, both for one
    token. For an embedding the moment of the row side is the diagonal of token counts; a head tied to the embedding
    contributes to the same moments. A side longer than 16,384 (a vocabulary) keeps only the diagonal. The moments are
    float64 and on the CPU. Where all moments together exceed `limit_bytes`, the sites are measured in groups with one
    pass each, and the moments of each group are spilled to disk. Those of the experts of one layer, experts * (in^2 +
    out^2) numbers, are float32 where they alone exceed it; a warning says so before the passes if that is still more.

    The model runs in eval mode. Its training mode, ``requires_grad`` flags, device and the random state are restored.

    Args:
        batches: an iterable of batches, such as a DataLoader; all are kept in memory, so take as many as are needed.
            A batch is one tensor, a tuple or list of arguments, (inputs, labels), or a mapping of keyword arguments,
            with the labels in an entry called ``labels``, ``label``, ``targets`` or ``target``. The last entry of a
            tuple is the labels if forward has no parameter for it; labels in a mapping are passed to forward only if
            it has a parameter of that name. Padding according to ``attention_mask`` is ignored, except where the
            encoder and the decoder of a model have the same number of tokens. A batch in a
            `tdkit.calibration.Weighted` counts by its weight. Or the name of a text, as in
            `tdkit.sources.load_texts`; windows spread over the whole text are used.
        gradients: also measure S, which takes a backward pass; otherwise S is None.
        names: the sites to measure, by the name of any of their layers; all sites when None.
        loss: a function (model output, batch) -> scalar tensor. It should sum over examples and tokens rather than
            average, so that each has the same weight. When None: the model's own ``loss`` where the output has one;
            with integer labels the cross-entropy of classes; with floating-point labels of the output's shape the
            squared error; without labels the next-token cross-entropy of a causal language model, which is tested by
            running the model. See `tdkit.calibration.losses.data_loss`.
        labels: the labels of the default loss: "data", or "sampled" from the model's predictions, for which S is the
            Fisher information. "sampled" estimates the cost of small changes better (up to a tenth of the parameters
            removed); with two fifths of the parameters removed, "data" gave far better results.
        tokenizer: the tokenizer for a text given by name.
        context: tokens per window of a text given by name.
        tokens: number of tokens to use of a text given by name.
        self_generated: number of tokens that the model generates beside the batches, in windows of `context`, for
            causal language models of transformers. They get a tenth of the weight. Units that the text does not use
            would else be removed, and text of another kind suffers: SmolLM2-135M, with two fifths of its blocks
            removed, has on code and its manual a third to a half of the perplexity with it.
        limit_bytes: the maximum size in bytes of the moments held in memory at once.
        device: the device to run on; the model is moved back afterwards. When None, the model is not moved, nor one
            with layers that hooks of accelerate load when they are called.
        progress: show a progress bar; when None, only on a terminal.

    Returns:
        The moments by site name.

    Raises:
        CalibrationError: when there are no batches, the model does not take them, `names` are unknown, it is not
            clear what the loss is, labels are missing, or a loss or a moment is not finite.

    Source of the two-sided moments: Martens and Grosse, K-FAC (2015), section 3; of the labels, see `sampled_loss`.
    """
    check_labels(labels)
    if loss is not None and labels != "data":
        raise CalibrationError(f"loss= has labels of its own: leave out labels={labels!r}")
    device = check_device(device)
    model = uncompiled(model)
    sites = survey(model).sites
    if names is not None:
        sites = named_sites(sites, names)
    if isinstance(batches, str | Path):
        batches = text_batches(batches, tokenizer, context=context, tokens=tokens)
    if self_generated:
        batches = with_self_generated(model, batches, self_generated, context=context, device=device, progress=progress)
    runner = Runner(model, gradients=gradients, loss=loss, labels=labels)
    return measured(runner, sites, batches, limit_bytes=limit_bytes, device=device, progress=progress)


def text_batches(name: str | Path, tokenizer: Any, *, context: int = 512, tokens: int = 16384) -> list[Tensor]:
    """Returns batches of one window of token ids (1, context), int64, spread over the whole text."""
    return [row[None] for row in spread_windows(name, tokenizer, context=context, tokens=tokens)]


def named_sites(sites: Sequence[Site], names: Collection[str]) -> tuple[Site, ...]:
    """Returns the sites that have one of `names`.

    Raises:
        CalibrationError: when a name belongs to no site.
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
    """Returns the mean of the moments in `calibration` and the moments of `sites` measured now on the same batches.

    `sites` may belong to layers that have been compressed since. The curvature of the loss between the dense and the
    compressed model is that of neither alone; on SmolLM2-135M the mean of both gave a lower perplexity than either.

    Raises:
        CalibrationError: when the calibration has no batches.
    """
    if calibration.batches is None:
        raise CalibrationError("the calibration was saved without its batches, so it cannot be measured again")
    runner = Runner(model, gradients=calibration.gradients, loss=calibration.loss, labels=calibration.labels)
    found = measured(runner, sites, calibration.batches, limit_bytes=limit_bytes, device=device, progress=progress)
    mean = runner.calibration(calibration.batches)
    mean.rows, mean.units = calibration.rows | found.rows, calibration.units or found.units
    for name in calibration.names:  # one that the batches do not reach now keeps its moments
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
    """Returns the moments of `sites`, measured while `runner` runs the batches; see `calibrate`."""
    check_batches(batches)
    chosen = list(batches)
    if not chosen:
        raise CalibrationError("there are no calibration batches: give at least one")
    if not sites:
        raise CalibrationError("the model has no layer that can be rewritten, so there is nothing to calibrate")
    device = check_device(device)
    _check_weights(runner)
    runner.check_batches(chosen)
    with torch.inference_mode(False), as_it_was(runner.model, device), without_fast_path():
        runner.find_causality(chosen)
        with reaching(sites) as reach, torch.no_grad():
            runner.forward(chosen[0])
        if not reach.sites and not runner.gradients:
            raise CalibrationError("the calibration batches reach no layer that can be rewritten")
        try:
            return _measure(runner, reach, chosen, limit_bytes, progress)
        except SharingBrokeError:
            return _measure(runner, Reach(reach.sites, reach.others), chosen, limit_bytes, progress)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Make ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` call their layers one by one."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _check_weights(runner: Runner) -> None:
    """Check that the parameters allow a forward and, with gradients, a backward pass.

    Raises:
        CalibrationError: when one does not; the message names the parameter and the remedy.
    """
    loaded_when_called = {  # by hooks of accelerate, which replace the forward of the module on the instance
        id(parameter)
        for module in runner.model.modules()
        if "forward" in vars(module)
        for parameter in module.parameters(recurse=False)
    }
    for name, parameter in runner.model.named_parameters():
        if is_lazy(parameter) or (parameter.is_meta and id(parameter) not in loaded_when_called):
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
    recorders = recorders_within(reach, runner.gradients, limit_bytes)
    calibration = runner.calibration(batches)
    with progress_bar("calibrate", len(recorders) * len(batches), progress) as bar:
        for number, make in enumerate(recorders):
            recorder = make()
            _pass(
                runner, recorder, batches, bar, f"group {number + 1} of {len(recorders)}" if len(recorders) > 1 else ""
            )
            calibration.add(recorder.metrics(), spill=len(recorders) > 1)
            calibration.rows |= recorder.rows()
            calibration.units = round(recorder.units)
    return calibration


def recorders_within(reach: Reach, gradients: bool, limit_bytes: int) -> list[Callable[[], Recorder]]:
    """Returns functions that make recorders of all sites, each with moments of at most `limit_bytes`, or one site."""
    passes = passes_within(reach.sites, reach.shared, gradients, limit_bytes) or [Pass([], 0)]
    passes[0].sites.extend(reach.others)  # a later batch may still reach these, or their weights have gradients
    for each in passes:
        if each.bytes > limit_bytes:
            _log.warning(
                "the moments of %s alone take %.1f GB, more than limit_bytes=%.1f GB, and its fits work on copies of "
                "parts of them",
                each.sites[0].name,
                each.bytes / 1e9,
                limit_bytes / 1e9,
            )
    unseen = {site.name for site in reach.others}
    recorder = partial(Recorder, gradients=gradients, shared=reach.shared, unseen=unseen, limit=limit_bytes)
    return [partial(recorder, each.sites) for each in passes]


def _pass(runner: Runner, recorder: Recorder, batches: list[Batch], bar: Bar, label: str) -> None:
    bar.now(label)
    with recorder.attached(), torch.set_grad_enabled(runner.gradients):
        for number, batch in enumerate(batches):
            if runner.gradients:
                drop_caches(runner.model)  # they would hold the graph of the batch before
            recorder.begin_batch(runner.mask(batch), unweighted(batch)[1])
            output = runner.forward(batch)
            if runner.gradients:
                try:
                    runner.backward(output, batch, number)
                except CalibrationError as error:
                    layer = recorder.overflowing()
                    if layer is None:
                        raise
                    raise CalibrationError(
                        f"{error}. {layer} is the first layer whose inputs are not finite, or overflow when squared"
                    ) from None
            recorder.end_batch(call_of(runner.model, batch).units)
            bar.advance()
    drop_caches(runner.model)
