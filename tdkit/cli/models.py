"""``tdkit plan``, ``compress``, ``quantize`` and ``info``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from tdkit.cli.options import (
    BatchSize,
    Budget,
    Build,
    CalibrationLabels,
    CalibrationText,
    CalibrationTokens,
    Context,
    Data,
    DtypeOption,
    EvaluationData,
    EvaluationText,
    EvaluationTokens,
    Every,
    InputsOnly,
    Match,
    ModelName,
    NoReport,
    PolicyFile,
    Prompt,
    SelfGenerated,
    Weights,
    With,
)
from tdkit.cli.output import AsJson, Command, Device, DryRun, note, settings, show

if TYPE_CHECKING:
    from tdkit.fitting.quantization import Bits


def plan(
    model: ModelName = None,
    build: Build = None,
    weights: Weights = None,
    policy: PolicyFile = None,
    with_: With = "low_rank",
    match: Match = None,
    budget: Budget = None,
    calibration: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 16384,
    self_generated: SelfGenerated = 0,
    data: Data = None,
    batch_size: BatchSize = 32,
    labels: CalibrationLabels = "data",
    inputs_only: InputsOnly = False,
    context: Context = 512,
    dtype: DtypeOption = "float32",
    every: Every = False,
    as_json: AsJson = False,
) -> None:
    """Show what a policy would do to every layer of a model; nothing is changed."""
    from tdkit.cli.loading import check_model, dtype_of, source_of
    from tdkit.cli.moments import Wanted
    from tdkit.cli.policies import policy_of
    from tdkit.planning.planner import planned
    from tdkit.planning.resolution import resolve

    check_model(model, build, weights)
    chosen = policy_of(policy, with_, match, budget)
    wanted = Wanted(calibration, data, calibration_tokens, context, labels, inputs_only, batch_size, self_generated)
    wanted.check()
    material = wanted.read()
    source = source_of(model, build, weights, dtype_of(dtype))
    resolved = resolve(source.model, chosen)
    made = planned(resolved, material.calibration(source, resolved))
    show(made.report(every=every), made.to_dict(), as_json)


def compress(
    model: ModelName = None,
    build: Build = None,
    weights: Weights = None,
    *,
    folder: Annotated[Path, typer.Option("--out", help="Where to save the compressed model.")],
    policy: PolicyFile = None,
    with_: With = "low_rank",
    match: Match = None,
    budget: Budget = None,
    calibration: CalibrationText = None,
    calibration_tokens: CalibrationTokens = 16384,
    self_generated: SelfGenerated = 0,
    data: Data = None,
    batch_size: BatchSize = 32,
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
    evaluation_data: EvaluationData = None,
    prompt: Prompt = None,
    no_report: NoReport = False,
    dtype: DtypeOption = "float32",
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier save.")] = False,
    every: Every = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model by a policy and save it, with a report."""
    import time

    from tdkit.cli.loading import check_model, dtype_of, source_of
    from tdkit.cli.measuring import Measuring, calibration_data
    from tdkit.cli.moments import Wanted
    from tdkit.cli.policies import check_folder, policy_of
    from tdkit.cli.reports import command_line, leave_record, leave_report
    from tdkit.cli.streaming import compress_streamed
    from tdkit.compression.apply import compress_resolved
    from tdkit.errors import OptionError
    from tdkit.evaluation.batches import HIGHER_IS_BETTER
    from tdkit.models.card import Card
    from tdkit.models.checkpoint import save
    from tdkit.planning.planner import planned
    from tdkit.planning.resolution import resolve
    from tdkit.records.before import Before
    from tdkit.support.devices import check_device

    name = check_model(model, build, weights)
    chosen = policy_of(policy, with_, match, budget)
    wanted = Wanted(calibration, data, calibration_tokens, context, labels, inputs_only, batch_size, self_generated)
    of_whole = {"--sequential": sequential, f"--passes {passes}": passes > 1}
    wanted.check(of_whole)
    if not dry_run:
        check_folder(folder, overwrite)
    check_device(device)
    at_hub = model is not None and not Path(model).exists()
    card = Card(policy=chosen.to_yaml(), budget=chosen.budget, base_model=model if at_hub else None)
    if stream:
        if model is None:
            raise OptionError("--stream reads folders of transformers: give MODEL, not --model")
        of_whole |= {
            "--evaluation": evaluation is not None,
            "--evaluation-data": evaluation_data is not None,
            "--prompt": prompt is not None,
        }
        made = compress_streamed(
            model, chosen, folder, wanted, of_whole, dtype_of(dtype), device, workers, overwrite, card, dry_run
        )
        if not dry_run and not no_report:
            leave_report(folder)
        show(made.report(every=every), made.to_dict(), as_json)
        return
    if workers > 1:
        raise OptionError(f"--workers {workers} needs --stream")
    settings.kept = "nothing was saved; tdkit calibrate keeps moments for --calibration, --stream keeps finished layers"
    material = wanted.read()
    measuring = Measuring.of(evaluation, evaluation_tokens, context, prompt, evaluation_data, batch_size)
    source = source_of(model, build, weights, dtype_of(dtype))
    measuring.check(source)
    resolved = resolve(source.model, chosen)
    started = time.perf_counter()
    known = material.calibration(source, resolved, device)
    made = planned(resolved, known)
    seconds = {"calibration and plan": time.perf_counter() - started}
    if not dry_run:
        before, dense = Before.of(resolved, made, known), measuring.figures(source, source.model)
        compared = measuring.to_compare(source.model)
        text = measuring.continuation(source.model, source)
        started = time.perf_counter()
        what = resolved.following(made) if passes == 1 else resolved
        compress_resolved(what, known, sequential=sequential, passes=passes, device=device)
        seconds["fit"] = time.perf_counter() - started
        save(source.model, folder, tokenizer=source.tokenizer, overwrite=overwrite, card=card)
        note(f"saved to {folder}" + (f"; load it with --model {name} --weights {folder}" if build else ""))
        record = before.record(
            source.model,
            name=folder.name,
            source=name,
            policy=chosen,
            options={
                "context": context,
                "labels": labels,
                "self_generated": self_generated,
                "inputs_only": inputs_only,
                "sequential": sequential,
                "passes": passes,
                "dtype": dtype,
                "device": device or "cpu",
            },
            command=command_line(),
            data=(*calibration_data(material), *measuring.data),
            dense=dense,
            compressed=measuring.figures(source, compared),
            higher_is_better=HIGHER_IS_BETTER,
            samples=measuring.samples(text, measuring.continuation(source.model, source)),
            seconds=seconds,
        )
        leave_record(record, folder, report=not no_report)
        made = record.plan or made
    show(made.report(every=every), made.to_dict(), as_json)


def info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that tdkit saved.")],
    as_json: AsJson = False,
) -> None:
    """Say what a saved folder holds: the model, its factorised layers, its size."""
    from tdkit.decompositions.registered import decomposition
    from tdkit.errors import CheckpointError
    from tdkit.models.checkpoint import place_of, read_description
    from tdkit.reporting.report import FOLDER
    from tdkit.shapes import by
    from tdkit.support.tables import table_of

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


def quantize(
    model: ModelName = None,
    build: Build = None,
    weights: Weights = None,
    *,
    folder: Annotated[Path, typer.Option("--out", help="Where to save the quantized model.")],
    bits: Annotated[int, typer.Option(help="Bits per number: 8 or 4.")] = 8,
    match: Match = None,
    no_report: NoReport = False,
    dtype: DtypeOption = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier save.")] = False,
    as_json: AsJson = False,
) -> None:
    """Round the factors and the dense weights of a model to 8 or 4 bits and save it, with a report."""
    from tdkit.cli.loading import check_model, dtype_of, source_of
    from tdkit.cli.policies import check_folder
    from tdkit.cli.reports import command_line, leave_record
    from tdkit.decompositions.quantized import Quantized
    from tdkit.fitting.quantization import check_torchao
    from tdkit.models.checkpoint import save
    from tdkit.models.quantization import quantize as round_weights
    from tdkit.models.sites import num_bytes
    from tdkit.planning.plan import megabytes
    from tdkit.records.following import followed, record_of

    name = check_model(model, build, weights)
    asked = cast("Bits", bits)
    Quantized(bits=asked)  # checks the bits before the model is loaded
    check_torchao()
    check_folder(folder, overwrite)
    source = source_of(model, build, weights, dtype_of(dtype))
    before, record = num_bytes(source.model), record_of(source.model, name, model or weights)
    round_weights(source.model, asked, match=match or ["*"])
    save(source.model, folder, tokenizer=source.tokenizer, overwrite=overwrite)
    then, command = f"rounded to {bits} bits", command_line()
    leave_record(
        followed(record, source.model, name=folder.name, then=then, command=command), folder, report=not no_report
    )
    after = num_bytes(source.model)
    show(
        f"saved to {folder}: {megabytes(before)} -> {megabytes(after)}",
        {"bytes_before": before, "bytes_after": after, "bits": bits},
        as_json,
    )


COMMANDS = (
    Command(plan, "tdkit plan smollm2 --with low_rank --match '*.mlp.*' --budget 0.9"),
    Command(
        compress,
        "tdkit compress smollm2 --with low_rank --match '*.mlp.*' --budget 0.9 --out smaller",
        "tdkit compress --model my_pkg.nets:build --weights net.safetensors --data train.safetensors --budget 0.6 "
        "--evaluation-data test.safetensors --out small",
    ),
    Command(quantize, "tdkit quantize smaller --bits 8 --out smallest"),
    Command(info, "tdkit info smaller"),
)
