"""``tdkit plan``, ``compress`` and ``info``."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer
import yaml

from tdkit.cli.calibration import (
    CalibrationLabels,
    CalibrationText,
    CalibrationTokens,
    InputsOnly,
    calibration_of,
    check_calibration,
    texts_or_moments,
)
from tdkit.cli.measuring import EvaluationText, EvaluationTokens, Measuring, Prompt, calibration_data
from tdkit.cli.options import Context, Dtype, ModelName, dtype_of
from tdkit.cli.output import AsJson, Device, DryRun, note, show
from tdkit.cli.report import NoReport, command_line, leave_report
from tdkit.cli.streaming import compress_streamed
from tdkit.compression.apply import compress_resolved
from tdkit.decompositions.quantized import Quantized
from tdkit.decompositions.registered import decomposition
from tdkit.errors import CheckpointError, OptionError, PolicyError
from tdkit.fitting.quantization import Bits, check_torchao
from tdkit.models.card import Card
from tdkit.models.checkpoint import is_saved, place_of, read_description, save
from tdkit.models.quantization import quantize as round_weights
from tdkit.models.sites import num_bytes
from tdkit.planning.plan import megabytes
from tdkit.planning.planner import planned
from tdkit.planning.policy import Policy
from tdkit.planning.resolution import resolve
from tdkit.planning.rule import Rule
from tdkit.records.before import Before
from tdkit.records.record import RECORD
from tdkit.reporting.report import FOLDER
from tdkit.shapes import by
from tdkit.sources.models import load_model
from tdkit.support.devices import check_device
from tdkit.support.tables import table_of

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
    check_calibration(calibration, {f"--labels {labels}": labels != "data", "--inputs-only": inputs_only})
    texts = texts_or_moments(calibration)
    source = load_model(model, dtype=dtype_of(dtype))
    resolved = resolve(source.model, chosen)
    made = planned(resolved, calibration_of(source, texts, calibration_tokens, context, labels, inputs_only, resolved))
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
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read, fit and write layer by layer, for models larger than memory. An interrupted call goes on when "
            "it is repeated.",
        ),
    ] = False,
    workers: Annotated[int, typer.Option(help="With --stream: processes that share the layers.", min=1)] = 1,
    evaluation: EvaluationText = None,
    evaluation_tokens: EvaluationTokens = None,
    prompt: Prompt = None,
    no_report: NoReport = False,
    dtype: Dtype = "float32",
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier save.")] = False,
    every: Every = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model by a policy and save it, with a report.

    [bold]tdkit compress smollm2 --with low_rank --match '*.mlp.*' --budget 0.9 --out smaller[/bold]
    """
    chosen = policy_of(policy, with_, match, budget)
    check_calibration(
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
    card = Card(policy=chosen.to_yaml(), budget=chosen.budget, base_model=None if Path(model).exists() else model)
    if stream:
        others = {
            "--sequential": sequential,
            f"--passes {passes}": passes > 1,
            "--evaluation": evaluation is not None,
            "--prompt": prompt is not None,
        }
        made = compress_streamed(
            model, chosen, folder, calibration, others, dtype_of(dtype), device, workers, overwrite, card, dry_run
        )
        if not dry_run and not no_report:
            leave_report(folder)
        show(made.report(every=every), made.to_dict(), as_json)
        return
    if workers > 1:
        raise OptionError(f"--workers {workers} needs --stream")
    texts = texts_or_moments(calibration)
    measuring = Measuring.of(evaluation, evaluation_tokens, context, prompt)
    source = load_model(model, dtype=dtype_of(dtype))
    measuring.check(source)
    resolved = resolve(source.model, chosen)
    started = time.perf_counter()
    known = calibration_of(source, texts, calibration_tokens, context, labels, inputs_only, resolved)
    made = planned(resolved, known)
    seconds = {"calibration and plan": time.perf_counter() - started}
    if not dry_run:
        before, dense = Before.of(resolved, made, known), measuring.figures(source)
        text = measuring.continuation(source.model, source)
        what = resolved.following(made) if passes == 1 else resolved
        started = time.perf_counter()
        compress_resolved(what, known, sequential=sequential, passes=passes, device=device)
        seconds["fit"] = time.perf_counter() - started
        save(source.model, folder, tokenizer=source.tokenizer, overwrite=overwrite, card=card)
        note(f"saved to {folder}")
        record = before.record(
            source.model,
            name=folder.name,
            source=model,
            policy=chosen,
            options={
                "context": context,
                "labels": labels,
                "inputs_only": inputs_only,
                "sequential": sequential,
                "passes": passes,
                "dtype": dtype,
                "device": device or "cpu",
            },
            command=command_line(),
            data=(*calibration_data(calibration, texts, calibration_tokens), *measuring.data),
            dense=dense,
            compressed=measuring.figures(source),
            samples=measuring.samples(text, measuring.continuation(source.model, source)),
            seconds=seconds,
        )
        record.save(folder / RECORD)
        made = record.plan or made
        if not no_report:
            leave_report(folder)
    show(made.report(every=every), made.to_dict(), as_json)


def info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that tdkit saved.")],
    as_json: AsJson = False,
) -> None:
    """Say what a saved folder holds: the model, its factorised layers, its size."""
    description = read_description(folder)
    files = (file for file in folder.rglob("*") if file.is_file() and (folder / FOLDER) not in file.parents)
    size = sum(file.stat().st_size for file in files)
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
