"""``tdkit bench``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from tdkit.cli.options import Budget, Build, DtypeOption, Match, ModelName, PolicyFile, Weights, With
from tdkit.cli.output import AsJson, Command, Device, note, show
from tdkit.errors import OptionError


def bench(
    model: ModelName = None,
    build: Build = None,
    weights: Weights = None,
    tokens: Annotated[str, typer.Option(help="Rows per call, as a list.")] = "1,16,512",
    train: Annotated[bool, typer.Option("--train", help="Forward and backward pass instead of inference.")] = False,
    prefer: Annotated[
        Literal["speed", "auto", "memory"],
        typer.Option(help="What may hold dense weights: 'speed' all that is faster dense, 'auto' all computed dense."),
    ] = "speed",
    policy: PolicyFile = None,
    with_: With = "low_rank",
    match: Match = None,
    budget: Budget = None,
    seconds: Annotated[float, typer.Option(help="How long to time each call.", min=0.01)] = 0.5,
    dtype: DtypeOption = "float32",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time dense against factorised layers and models, side by side.

    A dense model is rewritten by the policy with random factors first: its speed is known before any fit.
    """
    from tdkit.cli.loading import check_model, dtype_of, source_of
    from tdkit.cli.policies import policy_of
    from tdkit.evaluation.speed import benchmark, unfitted
    from tdkit.evaluation.timing import keep_freed_memory
    from tdkit.models.sites import factorized_groups
    from tdkit.planning.planner import plan
    from tdkit.support.devices import check_device

    check_model(model, build, weights)
    counts = _tokens(tokens)
    check_device(device)
    keep_freed_memory()
    source = source_of(model, build, weights, dtype_of(dtype), device)
    if not factorized_groups(source.model):
        chosen = policy_of(policy, with_, match, budget)
        note("the model is dense: the policy is tried on it with random factors")
        unfitted(source.model, plan(source.model, chosen))
    result = benchmark(source.model, tokens=counts, train=train, prefer=prefer, seconds=seconds)
    show(result.table(), result.to_dict(), as_json)


def _tokens(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise OptionError(f"--tokens {text!r} must be positive integers, such as 1,16,512")
    return counts


COMMANDS = (Command(bench, "tdkit bench smaller --tokens 1,16"),)
