"""``tdkit sweep``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tdkit.cli.options import (
    BatchSize,
    Build,
    Data,
    DtypeOption,
    EvaluationData,
    EvaluationText,
    EvaluationTokens,
    Labels,
    NoReport,
    PolicyFile,
    Prompt,
    Weights,
    Within,
)
from tdkit.cli.output import AsJson, Command, Device, DryRun, note, show
from tdkit.errors import OptionError

WITHIN = 0.05
CHOSEN = "chosen.yaml"  # in the folder of a sweep: the policy of the recommended point


def sweep(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="A model, or a recipe, whose model, texts and first compress or compare step are taken; not with "
            "--model.",
            show_default=False,
        ),
    ] = None,
    axes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE,VALUE", help="What varies: with, budget, allocation, min_keep.", show_default=False
        ),
    ] = None,
    build: Build = None,
    weights: Weights = None,
    *,
    folder: Annotated[Path, typer.Option("--out", help="The folder of the sweep; repeat the call to go on in it.")],
    policy: PolicyFile = None,
    match: Annotated[
        list[str] | None, typer.Option("--match", help="Globs of the layers to rewrite; all by default.")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option("--calibration", help="Fit in the metric of this text, or of saved moments; as in compress."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="How many tokens of the calibration text to use; 16384 by default.", min=2)
    ] = None,
    self_generated: Annotated[int | None, typer.Option(help="As in compress; 0 by default.", min=0)] = None,
    data: Data = None,
    batch_size: BatchSize = 32,
    labels: Annotated[Labels | None, typer.Option("--labels", help="As in compress: data or sampled.")] = None,
    inputs_only: Annotated[bool, typer.Option("--inputs-only", help="As in compress.")] = False,
    context: Annotated[int | None, typer.Option(help="Tokens per window; 512 by default.", min=2)] = None,
    sequential: Annotated[bool, typer.Option("--sequential", help="As in compress.")] = False,
    passes: Annotated[int, typer.Option(help="As in compress.", min=1)] = 1,
    evaluation: EvaluationText = None,
    evaluation_tokens: EvaluationTokens = None,
    evaluation_data: EvaluationData = None,
    prompt: Prompt = None,
    within: Within = None,
    jobs: Annotated[int, typer.Option(help="Processes that share the points, and the cores.", min=1)] = 1,
    log_with: Annotated[
        list[str] | None,
        typer.Option("--log-with", help="Trackers as accelerate names them, such as tensorboard or wandb."),
    ] = None,
    dtype: DtypeOption = "float32",
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard an earlier sweep in the folder.")] = False,
    no_report: NoReport = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model by all combinations of some values, measure each, and say which to take."""
    from tdkit.cli.loading import check_model
    from tdkit.cli.policies import policy_of
    from tdkit.cli.reports import command_line, leave_report
    from tdkit.cli.sweeping import Call, carry_out, of_recipe, say_points, say_records
    from tdkit.planning.policy import Policy
    from tdkit.recipes.library import load_recipe, recipe_files
    from tdkit.support.devices import check_device
    from tdkit.support.files import write_text
    from tdkit.support.trackers import check_trackers
    from tdkit.sweeps.choice import choose
    from tdkit.sweeps.grid import points_of, read_axes
    from tdkit.sweeps.run import flat

    model, varied = _model_and_axes(model, axes or [])
    check_model(model, build, weights)
    grid = read_axes(varied)
    check_device(device)
    check_trackers(log_with or (), folder)
    is_recipe = model is not None and (model.endswith((".yaml", ".yml")) or model in recipe_files())
    recipe = load_recipe(str(model)) if is_recipe else None
    call = Call(
        model=model,
        build=build,
        weights=None if weights is None else str(weights),
        folder=str(folder),
        calibration=calibration,
        calibration_tokens=calibration_tokens or 16384,
        self_generated=self_generated or 0,
        data=data,
        batch_size=batch_size,
        labels=labels or "data",
        inputs_only=inputs_only,
        context=context or 512,
        sequential=sequential,
        passes=passes,
        evaluation=evaluation,
        evaluation_tokens=evaluation_tokens,
        evaluation_data=evaluation_data,
        prompt=prompt,
        log_with=log_with or [],
        dtype=dtype,
        device=device,
        command=command_line(),
        within=WITHIN if within is None else within,
    )
    base = policy_of(policy, "low_rank", match, None) if policy is not None else None
    if recipe is not None:
        if policy is not None or match:
            raise OptionError(f"the recipe '{recipe.name}' has a policy of its own: leave out --policy and --match")
        base, call = of_recipe(recipe, call, labels, calibration_tokens, context, self_generated)
    points = points_of(grid, base, match or ["*"])
    call = call.with_points(points)
    if call.evaluation is None and call.evaluation_data is None:
        call = replace(call, evaluation_data=data)
        note(
            "nothing is measured but sizes: give --evaluation TEXT for perplexity, or --evaluation-data"
            if data is None
            else f"quality is measured on {data}, which the points are fitted to: --evaluation-data names other data"
        )
    if dry_run:
        form = [{"name": p.name, **p.varied, "policy": p.policy.to_dict()} for p in points]
        show(say_points(points), form, as_json)
        return
    records = carry_out(call, jobs=jobs, overwrite=overwrite, quiet=as_json)
    choice = choose(records, call.within)
    if choice.record is not None and choice.record.policy is not None:
        write_text(folder / CHOSEN, Policy.from_dict(choice.record.policy).to_yaml())
    if not no_report:
        leave_report(folder)
    rows = [flat(point, record) for point, record in zip(points, records, strict=True)]
    if not as_json:
        show(say_records(records), None, as_json=False)
    taken = "" if choice.record is None else f"\nto take it, compress again with --policy {folder / CHOSEN}"
    show(choice.text + taken, {"points": rows, "choice": choice.text}, as_json)


def _model_and_axes(model: str | None, axes: list[str]) -> tuple[str | None, list[str]]:
    """Returns the model or recipe, or None where the first word is an axis, and the axes.

    Raises:
        OptionError: when there is no axis.
    """
    key, equals, _ = (model or "").partition("=")
    if equals and key.isidentifier():
        model, axes = None, [str(model), *axes]
    if not axes:
        raise OptionError("nothing varies: give KEY=VALUE,VALUE, such as budget=0.9,0.8 or with=low_rank,kronecker")
    return model, axes


COMMANDS = (
    Command(
        sweep,
        "tdkit sweep smollm2 budget=0.9,0.8 with=low_rank,kronecker --match '*.mlp.*' --evaluation sotu:evaluation "
        "--evaluation-tokens 2048 --out sweep",
        "tdkit sweep --model my_pkg.nets:build --weights net.safetensors budget=0.8,0.6 with=low_rank,auto "
        "--data train.safetensors --evaluation-data test.safetensors --out nets",
    ),
)
