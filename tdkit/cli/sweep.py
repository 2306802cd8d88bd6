"""``tdkit sweep``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tdkit.calibration.losses import Labels
from tdkit.cli.measuring import EvaluationText, EvaluationTokens, Prompt
from tdkit.cli.models import PolicyFile, policy_of
from tdkit.cli.options import Dtype, dtype_of
from tdkit.cli.output import AsJson, Device, DryRun, note, show
from tdkit.cli.report import NoReport, Within, command_line, leave_report
from tdkit.cli.sweeping import Call, carry_out, say_points, say_records
from tdkit.errors import OptionError
from tdkit.planning.policy import Policy
from tdkit.recipes.library import load_recipe, recipe_files
from tdkit.recipes.recipe import Recipe
from tdkit.recipes.steps import CompareStep, CompressStep
from tdkit.support.devices import check_device
from tdkit.support.files import write_text
from tdkit.support.trackers import check_trackers
from tdkit.sweeps.choice import choose
from tdkit.sweeps.grid import points_of, read_axes
from tdkit.sweeps.run import flat

WITHIN = 0.05
CHOSEN = "chosen.yaml"  # in the folder of a sweep: the policy of the recommended point


def sweep(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="A model, or a recipe, whose model, texts and first compress or compare step are taken.",
        ),
    ],
    axes: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE,VALUE...", help="What varies: with, budget, allocation, min_keep."),
    ],
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
    labels: Annotated[Labels | None, typer.Option("--labels", help="As in compress: data or sampled.")] = None,
    inputs_only: Annotated[bool, typer.Option("--inputs-only", help="As in compress.")] = False,
    context: Annotated[int | None, typer.Option(help="Tokens per window; 512 by default.", min=2)] = None,
    sequential: Annotated[bool, typer.Option("--sequential", help="As in compress.")] = False,
    passes: Annotated[int, typer.Option(help="As in compress.", min=1)] = 1,
    evaluation: EvaluationText = None,
    evaluation_tokens: EvaluationTokens = None,
    prompt: Prompt = None,
    within: Within = None,
    jobs: Annotated[int, typer.Option(help="Processes that share the points, and the cores.", min=1)] = 1,
    log_with: Annotated[
        list[str] | None,
        typer.Option("--log-with", help="Trackers as accelerate names them, such as tensorboard or wandb."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard an earlier sweep in the folder.")] = False,
    no_report: NoReport = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model by all combinations of some values, measure each, and say which to take.

    [bold]tdkit sweep smollm2 budget=0.9,0.8 with=low_rank,kronecker --match '*.mlp.*' --calibration sotu:calibration
    --evaluation sotu:evaluation --out sweeps/smollm2[/bold]
    """
    grid = read_axes(axes)
    check_device(device)
    check_trackers(log_with or (), folder)
    dtype_of(dtype)
    recipe = load_recipe(model) if model.endswith((".yaml", ".yml")) or model in recipe_files() else None
    call = Call(
        model=model,
        folder=str(folder),
        calibration=calibration,
        calibration_tokens=calibration_tokens or 16384,
        labels=labels or "data",
        inputs_only=inputs_only,
        context=context or 512,
        sequential=sequential,
        passes=passes,
        evaluation=evaluation,
        evaluation_tokens=evaluation_tokens,
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
        base, call = _of_recipe(recipe, call, labels, calibration_tokens, context)
    points = points_of(grid, base, match or ["*"])
    call = call.with_points(points)
    if call.evaluation is None:
        note("nothing is measured but sizes: give --evaluation TEXT for perplexity")
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


def _of_recipe(
    recipe: Recipe, call: Call, labels: Labels | None, calibration_tokens: int | None, context: int | None
) -> tuple[Policy, Call]:
    """Returns the policy that a recipe compresses by, and the call with what the command line left open."""
    found = next(((k, each) for k, each in recipe.steps if isinstance(each, CompressStep | CompareStep)), None)
    if found is None:
        raise OptionError(f"the recipe '{recipe.name}' has no compress or compare step to vary")
    kind, step = found
    others = [other for other, each in recipe.steps if each is not step]
    if others:
        note(f"of the recipe's steps only {kind} is swept, and the points are evaluated; left out: {', '.join(others)}")
    data = recipe.data
    calibrated = step.calibrated or call.calibration is not None
    own = replace(
        call,
        model=recipe.model,
        dtype=recipe.dtype,
        seed=recipe.seed,
        calibration=call.calibration or (_listed(data.calibration) if calibrated else None),
        calibration_tokens=calibration_tokens or data.calibration_tokens,
        labels=labels or (data.calibration_labels if calibrated else "data"),
        context=context or data.context,
        evaluation=call.evaluation or _listed(data.evaluation),
        evaluation_tokens=call.evaluation_tokens or data.evaluation_tokens,
    )
    if isinstance(step, CompressStep):
        passes = max(call.passes, step.passes)
        return step.policy, replace(own, sequential=call.sequential or step.sequential, passes=passes)
    return step.policy, own


def _listed(texts: str | list[str] | None) -> list[str] | None:
    return [texts] if isinstance(texts, str) else texts


COMMANDS = (sweep,)
