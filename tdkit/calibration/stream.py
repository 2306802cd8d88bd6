"""Measure the moments of a model whose weights stay in files: its blocks are brought into memory one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from tdkit.calibration.batches import Batch, check_batches
from tdkit.calibration.calibration import Calibration, Loss
from tdkit.calibration.chain_calibration import IN_MEMORY, ChainCalibration
from tdkit.calibration.chains import Blocks, blocks_of, without_cache
from tdkit.calibration.losses import Labels, check_labels
from tdkit.calibration.measure import LIMIT_BYTES, named_sites, text_batches, without_fast_path
from tdkit.calibration.runner import Runner
from tdkit.calibration.states import States
from tdkit.errors import CalibrationError
from tdkit.models.sites import survey
from tdkit.sources.on_disk import OpenedModel, open_model
from tdkit.support.devices import check_device
from tdkit.support.files import scratch_folder
from tdkit.support.progress import progress_bar


def calibrate_folder(
    source: str | Path,
    batches: Iterable[Batch] | str | Path,
    out: str | Path | None = None,
    *,
    gradients: bool = True,
    names: Collection[str] | None = None,
    loss: Loss | None = None,
    labels: Labels = "data",
    context: int = 512,
    tokens: int = 16384,
    limit_bytes: int = LIMIT_BYTES,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    scratch: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Calibration:
    """Measure what `calibrate` measures on a model in files, with one block of it in memory at a time.

    For models whose blocks form one chain: the largest `nn.ModuleList` or `nn.Sequential`, each of whose children takes
    what the previous one returned, as in language models of one stack. The hidden states of all batches are kept on
    disk. The blocks run forward one after the other and then, with `gradients`, backward, where each computes its
    forward pass again. What surrounds them (embeddings, the head) is in memory as a whole while it runs. Memory is that
    of the largest of these parts, of one batch, and of the moments of a block, at most `limit_bytes`. The moments are
    kept on disk.

    Args:
        source: a folder of a transformers model with safetensors files, or a hub name.
        batches: as in `calibrate`.
        out: a folder to save the calibration to; when None it is only returned.
        gradients: also measure the moments of the output gradients, by a backward pass; as in `calibrate`.
        names: the sites to measure; every rewritable one when None.
        loss: as in `calibrate`.
        labels: as in `calibrate`.
        context: tokens per window of a text.
        tokens: of a text to use.
        limit_bytes: the maximum size in bytes of the moments in memory at once; each block runs again for more.
        dtype: of the weights; when None, that of the config of `source`.
        device: the device to run on; the CPU when None.
        scratch: where to make a temporary folder for hidden states; the system's place for such folders when None.
        overwrite: replace an earlier calibration in `out`.
        progress: show a progress bar; when None, only on a terminal.

    Returns:
        The moments by site name.

    Raises:
        SourceError, CheckpointError: when `source` cannot be opened.
        CalibrationError: as `calibrate`; also when the blocks do not form one chain, something but the hidden states
            goes through them, or the output of the model depends on more than what the last one returns.
    """
    check_labels(labels)
    if loss is not None and labels != "data":
        raise CalibrationError(f"loss= has labels of its own: leave out labels={labels!r}")
    opened = open_model(source, dtype=dtype)
    if isinstance(batches, str | Path):
        batches = text_batches(batches, opened.tokenizer, context=context, tokens=tokens)
    at = torch.device(check_device(device) or "cpu")
    runner = Runner(opened.model, gradients=gradients, loss=loss, labels=labels, device=at)
    calibration = calibrate_opened(
        opened, runner, batches, names=names, limit_bytes=limit_bytes, scratch=scratch, progress=progress
    )
    if out is not None:
        calibration.save(out, overwrite=overwrite)
    return calibration


def calibrate_opened(
    opened: OpenedModel,
    runner: Runner,
    batches: Iterable[Batch],
    *,
    names: Collection[str] | None = None,
    limit_bytes: int = LIMIT_BYTES,
    scratch: str | Path | None = None,
    progress: bool | None = None,
) -> Calibration:
    """As `calibrate_folder`, for a model that is open and a `runner` of it."""
    check_batches(batches)
    chosen = list(batches)
    if not chosen:
        raise CalibrationError("there are no calibration batches: give at least one")
    runner.check_batches(chosen)
    opened.weights.move_to(runner.device)
    opened.model.requires_grad_(False)
    every = survey(opened.model).sites
    sites = every if names is None else named_sites(every, names)
    blocks = blocks_of(opened.model, every)
    _check_others(opened.model, blocks)
    steps = len(blocks[0].choices[-1]) * len(chosen) * (2 if runner.gradients else 1)
    with (
        scratch_folder("states", scratch) as folder,
        progress_bar("calibrate", steps, progress) as bar,
        torch.inference_mode(False),
        torch.random.fork_rng(devices=[]),
        without_fast_path(),
        without_cache(opened.model),
    ):
        states = States(folder, runner.device)
        names = blocks[0].choices[-1]
        return ChainCalibration(opened, runner, sites, names, chosen, states, limit_bytes, bar).run()


def _check_others(model: nn.Module, blocks: Sequence[Blocks]) -> None:
    """Check that other lists of blocks are small: they are in memory as a whole with what surrounds the chain.

    Raises:
        CalibrationError: when they are larger than a block of the chain.
    """
    block = max(sum(p.numel() for p in model.get_submodule(name).parameters()) for name in blocks[0].choices[-1])
    if sum(each.params for each in blocks[1:]) > block:
        lists = ", ".join(each.choices[-1][0].rpartition(".")[0] for each in blocks)
        raise CalibrationError(f"the model has several lists of blocks ({lists}), which are no one chain: {IN_MEMORY}")
