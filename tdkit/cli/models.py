"""``tdkit plan``, ``compress`` and ``info``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
import yaml

from tdkit.calibration.calibration import Calibration
from tdkit.calibration.losses import Labels
from tdkit.cli.output import AsJson, Device, DryRun, note, show
from tdkit.compression.apply import compress_resolved
from tdkit.decompositions.quantized import Quantized
from tdkit.decompositions.registered import decomposition
from tdkit.errors import CheckpointError, OptionError, PolicyError
from tdkit.evaluation.language_models import check_causal, check_takes_text
from tdkit.fitting.quantization import Bits, check_torchao
from tdkit.models.card import Card
from tdkit.models.checkpoint import is_saved, place_of, read_description, save
from tdkit.models.quantization import quantize as round_weights
from tdkit.models.sites import num_bytes
from tdkit.planning.plan import megabytes
from tdkit.planning.planner import applied_plan, calibrated, planned
from tdkit.planning.policy import Policy
from tdkit.planning.resolution import Resolved, resolve
from tdkit.planning.rule import Rule
from tdkit.shapes import by
from tdkit.sources.models import DTYPES, load_model
from tdkit.sources.positions import check_positions
from tdkit.sources.source import Source
from tdkit.sources.texts import encode, load_texts, windows
from tdkit.support.devices import check_device
from tdkit.support.tables import table_of

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a registered name such as smollm2 (tdkit sources lists them), or a hub name."
    ),
]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="A YAML policy; instead of --with and --match.")]
With = Annotated[
    str, typer.Option("--with", help="A decomposition, also as YAML: '{kronecker: {terms: 4, b: [2, 4]}}'.")
]
Match = Annotated[list[str] | None, typer.Option("--match", help="Globs of the layers to rewrite; all by default.")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Params after / params before of the whole model, or another unit: '{bytes: 0.3, dtype: int4}', "
        "'{multiply_adds: 0.5}'."
    ),
]
Dtype = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")]
CalibrationText = Annotated[
    list[str] | None,
    typer.Option("--calibration", help="Fit in the metric of this text: a file, a folder, a name (sotu:calibration)."),
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
Context = Annotated[int, typer.Option(help="Tokens per window.", min=2)]
Every = Annotated[bool, typer.Option("--every", help="One row per layer, also in a long table.")]


def plan(
    model: ModelName,
    policy: PolicyFile = None,
    with_: With = "low_rank",
    match: Match = None,
    budget: Budget = None,
    calibration: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 16384,
    labels: CalibrationLabels = "data",
    inputs_only: InputsOnly = False,
    context: Context = 512,
    dtype: Dtype = "float32",
    every: Every = False,
    as_json: AsJson = False,
) -> None:
    """Show what a policy would do to every layer of a model; nothing is changed."""
    chosen = policy_of(policy, with_, match, budget)
    _check_calibration(calibration, {f"--labels {labels}": labels != "data", "--inputs-only": inputs_only})
    texts = None if calibration is None else load_texts(calibration)
    source = load_model(model, dtype=dtype_of(dtype))
    resolved = resolve(source.model, chosen)
    made = planned(resolved, _calibration(source, texts, calibration_tokens, context, labels, inputs_only, resolved))
    show(made.report(every=every), made.to_dict(), as_json)


def compress(
    model: ModelName,
    folder: Annotated[Path, typer.Option("--out", help="Where to save the compressed model.")],
    policy: PolicyFile = None,
    with_: With = "low_rank",
    match: Match = None,
    budget: Budget = None,
    calibration: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 16384,
    labels: CalibrationLabels = "data",
    inputs_only: InputsOnly = False,
    context: Context = 512,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Fit block by block on what the compressed prefix produces.")
    ] = False,
    passes: Annotated[
        int, typer.Option(help="Fit so often, each time in the moments of what the pass before made.", min=1)
    ] = 1,
    dtype: Dtype = "float32",
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier save.")] = False,
    every: Every = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model by a policy and save it."""
    chosen = policy_of(policy, with_, match, budget)
    _check_calibration(
        calibration,
        {
            "--sequential": sequential,
            f"--passes {passes}": passes > 1,
            f"--labels {labels}": labels != "data",
            "--inputs-only": inputs_only,
        },
    )
    if not dry_run:
        _check_folder(folder, overwrite)
    check_device(device)
    texts = None if calibration is None else load_texts(calibration)
    source = load_model(model, dtype=dtype_of(dtype))
    resolved = resolve(source.model, chosen)
    known = _calibration(source, texts, calibration_tokens, context, labels, inputs_only, resolved)
    made = planned(resolved, known)
    if not dry_run:
        what = resolved.following(made) if passes == 1 else resolved
        compress_resolved(what, known, sequential=sequential, passes=passes, device=device)
        card = Card(policy=chosen.to_yaml(), budget=chosen.budget, base_model=None if Path(model).exists() else model)
        save(source.model, folder, tokenizer=source.tokenizer, overwrite=overwrite, card=card)
        made = replace(applied_plan(source.model), warnings=made.warnings, bytes_before=made.bytes_before)
        note(f"saved to {folder}")
    show(made.report(every=every), made.to_dict(), as_json)


def info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that tdkit saved.")],
    as_json: AsJson = False,
) -> None:
    """Say what a saved folder holds: the model, its factorised layers, its size."""
    description = read_description(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    rows = []
    for number, layer in enumerate(description["layers"]):
        try:
            kind = decomposition(layer["decomposition"])
            rows.append(
                [
                    " = ".join(layer["names"]),
                    by(layer["shape"]),
                    kind.describe(),
                    f"{kind.num_params(kind.shape_of(tuple(layer['shape']))):,}",
                    "" if layer.get("error") is None else f"{layer['error']:.4f}",
                ]
            )
        except (KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{place_of(folder)} is damaged: layer {number}: {error}") from None
    title = f"{description['model'].get('class')}, {len(rows)} factorised matrices, {size / 1e6:.1f} MB on disk"
    table = table_of(title, ["layer", "shape", "decomposition", "params", "relative error"], rows)
    show(table, {**description, "bytes_on_disk": size}, as_json)


def policy_of(file: Path | None, with_: str, match: list[str] | None, budget: str | None) -> Policy:
    asked = None
    if budget is not None:
        try:
            asked = yaml.safe_load(budget)
        except yaml.YAMLError as error:
            raise OptionError(f"--budget {budget!r} is not YAML: {error}") from None
    if file is not None:
        if not file.is_file():
            raise PolicyError(f"policy file {file} does not exist")
        chosen = Policy.from_yaml(file)
        return chosen if asked is None else replace(chosen, budget=asked)
    try:
        kind = decomposition(yaml.safe_load(with_))
    except yaml.YAMLError as error:
        raise OptionError(f"--with {with_!r} is not YAML: {error}") from None
    return Policy([Rule(glob, kind) for glob in match or ["*"]], asked)


def _check_calibration(calibration: list[str] | None, given: Mapping[str, bool]) -> None:
    for option, is_given in given.items():
        if is_given and calibration is None:
            raise OptionError(f"{option} needs --calibration TEXT")


def _calibration(
    source: Source,
    texts: list[str] | None,
    tokens: int,
    context: int,
    labels: Labels,
    inputs_only: bool,
    resolved: Resolved,
) -> Calibration | None:
    if texts is None:
        return None
    doing, remedy = "--calibration", "calibrate it in Python on batches with labels, tdkit.calibrate(model, batches)"
    check_takes_text(source.model, doing, remedy)
    check_positions(source.model, context)
    ids = encode(texts, source.tokenizer, tokens)
    if not inputs_only and labels == "data":
        check_causal(source.model, ids, doing, f"give --inputs-only, or {remedy}")
    return calibrated(resolved, torch.split(windows(ids, context), 1), gradients=not inputs_only, labels=labels)


def dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise OptionError(f"--dtype {name} is none of {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise PolicyError(f"{folder} is a file: give a folder")
    if any(folder.iterdir()):
        if not is_saved(folder):
            raise PolicyError(f"{folder} holds other files: give another folder")
        if not overwrite:
            raise PolicyError(f"{folder} holds an earlier save: give another folder, or --overwrite it")


def quantize(
    model: ModelName,
    folder: Annotated[Path, typer.Option("--out", help="Where to save the quantized model.")],
    bits: Annotated[int, typer.Option(help="Bits per number: 8 or 4.")] = 8,
    match: Match = None,
    dtype: Dtype = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier save.")] = False,
    as_json: AsJson = False,
) -> None:
    """Round the factors and the dense weights of a model to 8 or 4 bits and save it."""
    Quantized(bits=cast(Bits, bits))  # checks the bits before the model is loaded
    check_torchao()
    _check_folder(folder, overwrite)
    source = load_model(model, dtype=dtype_of(dtype))
    before = num_bytes(source.model)
    round_weights(source.model, cast(Bits, bits), match=match or ["*"])
    save(source.model, folder, tokenizer=source.tokenizer, overwrite=overwrite)
    after = num_bytes(source.model)
    show(
        f"saved to {folder}: {megabytes(before)} -> {megabytes(after)}",
        {"bytes_before": before, "bytes_after": after, "bits": bits},
        as_json,
    )


COMMANDS = (plan, compress, quantize, info)
