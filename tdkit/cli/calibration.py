"""``tdkit calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tdkit.cli.options import (
    BatchSize,
    Build,
    CalibrationLabels,
    Context,
    Data,
    DtypeOption,
    InputsOnly,
    ModelName,
    SelfGenerated,
    Weights,
)
from tdkit.cli.output import AsJson, Command, Device, note, show


def calibrate(
    model: ModelName = None,
    build: Build = None,
    weights: Weights = None,
    *,
    folder: Annotated[Path, typer.Option("--out", help="Where to save the moments.")],
    text: Annotated[
        list[str] | None, typer.Option(help="A file, a folder, a name (sotu:calibration) or a dataset.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of the text to use.", min=2)] = 16384,
    self_generated: SelfGenerated = 0,
    data: Data = None,
    batch_size: BatchSize = 32,
    labels: CalibrationLabels = "data",
    inputs_only: InputsOnly = False,
    context: Context = 512,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Bring one block at a time into memory; for models larger than memory."),
    ] = False,
    dtype: DtypeOption = "float32",
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier moments.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the moments of a model on a text or data and save them, for --calibration of plan and compress."""
    from tdkit.calibration.calibration import is_saved_calibration
    from tdkit.calibration.measure import calibrate as calibrate_in_memory
    from tdkit.calibration.stream import calibrate_folder
    from tdkit.cli.loading import check_model, dtype_of, source_of
    from tdkit.cli.moments import Wanted
    from tdkit.errors import OptionError
    from tdkit.sources.on_disk import open_model
    from tdkit.support.devices import check_device

    kind = dtype_of(dtype)
    check_device(device)
    name = check_model(model, build, weights)
    if (text is None) == (data is None):
        raise OptionError("give what to calibrate on: --text or --data")
    if folder.exists() and not (overwrite and is_saved_calibration(folder)):
        raise OptionError(f"{folder} exists: give a new folder, or --overwrite for earlier moments")
    if self_generated and (stream or text is None):
        raise OptionError("--self-generated goes with --text, without --stream: the whole model generates")
    if stream and (model is None or data is not None):
        raise OptionError("--stream reads folders of transformers and texts: give MODEL and --text")
    material = Wanted(text, data, tokens, context, labels, inputs_only, batch_size, self_generated).read()
    gradients = not inputs_only
    if stream:
        opened = open_model(name, dtype=kind)
        batches = material.windows_for(opened.model, opened.tokenizer)
        known = calibrate_folder(
            name, batches, folder, gradients=gradients, labels=labels, dtype=kind, device=device, overwrite=overwrite
        )
        count = len(batches)
    else:
        source = source_of(model, build, weights, kind)
        given = material.batches_for(source, device)
        if given is None:
            raise OptionError(f"--text {' '.join(text or ())} holds saved moments, not a text")
        known = calibrate_in_memory(source.model, given, gradients=gradients, labels=labels, device=device)
        known.save(folder, overwrite=overwrite)
        count = len(known.batches or ())
    note(f"saved to {folder}")
    figures = {"folder": str(folder), "layers": len(known.names), "batches": count, "gradients": known.gradients}
    on = f"{count} batches of {data}" if text is None else f"{count} windows of {context} tokens"
    on += ", of the text and of the model" if self_generated else ""
    show(f"moments of {len(known.names)} layers on {on}", figures, as_json)


COMMANDS = (Command(calibrate, "tdkit calibrate smollm2 --text sotu:calibration --tokens 4096 --out moments"),)
