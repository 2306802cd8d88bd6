"""``tdkit calibrate``, and the calibration that other commands take: a text, or moments that were saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tdkit.calibration.calibration import Calibration, is_saved_calibration
from tdkit.calibration.losses import Labels
from tdkit.calibration.measure import calibrate as calibrate_in_memory
from tdkit.calibration.stream import calibrate_folder
from tdkit.cli.options import Context, Dtype, ModelName, dtype_of
from tdkit.cli.output import AsJson, Device, note, show
from tdkit.errors import OptionError
from tdkit.evaluation.language_models import check_causal, check_takes_text
from tdkit.planning.planner import calibrated
from tdkit.planning.resolution import Resolved
from tdkit.sources.models import load_model
from tdkit.sources.on_disk import open_model
from tdkit.sources.positions import check_positions
from tdkit.sources.source import Source
from tdkit.sources.texts import encode, load_texts, windows
from tdkit.support.devices import check_device

DOING = "--calibration"
IN_PYTHON = "calibrate it in Python on batches with labels, tdkit.calibrate(model, batches)"

CalibrationText = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        help="Fit in the metric of this text: a file, a folder, a name (sotu:calibration); or of saved moments: a "
        "folder that tdkit calibrate wrote.",
    ),
]
CalibrationTokens = Annotated[int, typer.Option(help="How many tokens of the calibration text to use.", min=2)]
CalibrationLabels = Annotated[
    Labels,
    typer.Option(
        "--labels", help="Calibrate on the text's own next tokens, or on ones the model draws (light compression)."
    ),
]
InputsOnly = Annotated[
    bool,
    typer.Option("--inputs-only", help="Calibrate on the inputs of layers alone; for encoders, which have no loss."),
]


def calibrate(
    model: ModelName,
    folder: Annotated[Path, typer.Option("--out", help="Where to save the moments.")],
    text: Annotated[list[str], typer.Option(help="A file, a folder, a name (sotu:calibration) or a dataset.")],
    tokens: Annotated[int, typer.Option(help="How many tokens of the text to use.", min=2)] = 16384,
    labels: CalibrationLabels = "data",
    inputs_only: InputsOnly = False,
    context: Context = 512,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Bring one block at a time into memory; for models larger than memory."),
    ] = False,
    dtype: Dtype = "float32",
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier moments.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the moments of a model on a text and save them, for --calibration of plan and compress."""
    kind = dtype_of(dtype)
    check_device(device)
    texts = load_texts(text)
    if folder.exists() and not (overwrite and is_saved_calibration(folder)):
        raise OptionError(f"{folder} exists: give a new folder, or --overwrite for earlier moments")
    if stream:
        opened = open_model(model, dtype=kind)
        batches = _windows(opened.model, opened.tokenizer, texts, tokens, context)
        known = calibrate_folder(
            model,
            batches,
            folder,
            gradients=not inputs_only,
            labels=labels,
            dtype=kind,
            device=device,
            overwrite=overwrite,
        )
    else:
        source = load_model(model, dtype=kind)
        batches = batches_of(source, texts, tokens, context, labels, inputs_only)
        known = calibrate_in_memory(source.model, batches, gradients=not inputs_only, labels=labels, device=device)
        known.save(folder, overwrite=overwrite)
    note(f"saved to {folder}")
    figures = {"folder": str(folder), "layers": len(known.names), "batches": len(batches), "gradients": known.gradients}
    show(f"moments of {len(known.names)} layers on {len(batches)} windows of {context} tokens", figures, as_json)


def check_calibration(calibration: list[str] | None, given: Mapping[str, bool]) -> None:
    """Check that options that are about a calibration have one, and that saved moments are given alone.

    Raises:
        OptionError: otherwise.
    """
    for option, is_given in given.items():
        if is_given and calibration is None:
            raise OptionError(f"{option} needs --calibration TEXT")
    saved = [each for each in calibration or () if is_saved_calibration(each)]
    if saved and len(calibration or ()) > 1:
        raise OptionError(f"--calibration {saved[0]} holds saved moments: give it alone, without texts")


def saved_moments(calibration: list[str] | None) -> Path | None:
    """Returns the folder of saved moments that ``--calibration`` names, or None if it names texts or nothing."""
    return Path(calibration[0]) if calibration and is_saved_calibration(calibration[0]) else None


def calibration_of(
    source: Source,
    texts: list[str] | Calibration | None,
    tokens: int,
    context: int,
    labels: Labels,
    inputs_only: bool,
    resolved: Resolved,
) -> Calibration | None:
    """Returns the calibration of the sites to rewrite on some texts, or the one that is given."""
    if texts is None or isinstance(texts, Calibration):
        return texts
    batches = batches_of(source, texts, tokens, context, labels, inputs_only)
    return calibrated(resolved, batches, gradients=not inputs_only, labels=labels)


def texts_or_moments(calibration: list[str] | None) -> list[str] | Calibration | None:
    """Returns what ``--calibration`` names."""
    folder = saved_moments(calibration)
    if folder is not None:
        return Calibration.load(folder)
    return None if calibration is None else load_texts(calibration)


def batches_of(
    source: Source, texts: list[str], tokens: int, context: int, labels: Labels, inputs_only: bool
) -> tuple[torch.Tensor, ...]:
    """Returns the windows of some texts to calibrate a causal language model on, each as a batch of one."""
    batches = _windows(source.model, source.tokenizer, texts, tokens, context)
    if not inputs_only and labels == "data":
        check_causal(
            source.model, torch.cat([b.flatten() for b in batches]), DOING, f"give --inputs-only, or {IN_PYTHON}"
        )
    return batches


def _windows(model: nn.Module, tokenizer: Any, texts: list[str], tokens: int, context: int) -> tuple[torch.Tensor, ...]:
    check_takes_text(model, DOING, IN_PYTHON)
    check_positions(model, context)
    return torch.split(windows(encode(texts, tokenizer, tokens), context), 1)


COMMANDS = (calibrate,)
