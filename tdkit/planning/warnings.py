"""What a plan does that its user may not have meant, as texts with the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from tdkit.models.sites import Untouchable
from tdkit.planning.allocation import FLOOR
from tdkit.planning.heads import heads, rank_of
from tdkit.planning.plan import Plan, percent
from tdkit.planning.resolution import Resolved
from tdkit.planning.step import Step

LITTLE = 0.1  # params after / params before of a layer, below which a plan warns
LOST = 0.01  # share of the weights that rules match and that cannot be rewritten, above which a plan warns
SMALL_PART = 0.5  # share of the parameters below which the weights whose size a budget chooses are a small part
NAMED = 3  # layers that a warning names


def warnings_of(plan: Plan, resolved: Resolved) -> tuple[str, ...]:
    """Returns the warnings of a plan that was made from `resolved`."""
    return (
        *_factorized(resolved),
        *_lost(plan, resolved),
        *_missed(plan),
        *_crushed(plan, resolved),
        *_cut(plan.rewritten, _below_floor(plan, resolved)),
        *_heads(resolved.model, plan.steps),
    )


def warnings_of_applied(plan: Plan, model: nn.Module) -> tuple[str, ...]:
    """Returns the warnings of a plan that was read from a compressed model."""
    return (*_cut(plan.rewritten, 0), *_heads(model, plan.steps))


def _factorized(resolved: Resolved) -> Iterator[str]:
    names = resolved.survey.factorized
    if names:
        yield (
            f"factorised already and not compressed again: {_named(names)}; ratio and budget are of the model as it "
            "is; for other sizes compress the dense model"
        )


def _lost(plan: Plan, resolved: Resolved) -> Iterator[str]:
    """Of weights that a rule matches and that cannot be rewritten."""
    rules = [] if resolved.policy is None else [rule for rule in resolved.policy.rules if not rule.keep]
    lost = [w for w in plan.untouchable if any(rule.names_match(name) for rule in rules for name in w.names)]
    size = sum(weight.params for weight in lost)
    if plan.weights and size > LOST * plan.weights:
        by_reason: dict[str, list[Untouchable]] = {}
        for weight in sorted(lost, key=lambda weight: -weight.params):
            by_reason.setdefault(weight.reason, []).append(weight)
        reasons = (f"{_named([w.name for w in alike])}: {reason}" for reason, alike in by_reason.items())
        share = percent(size / plan.weights)
        yield f"{share} of the weights match a rule and cannot be rewritten ({'; '.join(list(reasons)[:NAMED])})"


def _missed(plan: Plan) -> Iterator[str]:
    """Of a budget that the rules leave no rank open for."""
    target = plan.target
    if target is None or target.unit == "multiply_adds":
        return
    ratio = plan.ratio if target.unit == "params" else (plan.bytes_after or 0) / (plan.bytes_before or 1)
    if ratio > target.ratio:
        yield (
            f"the ratio is {ratio:.4f}, above the budget {target}: there is no layer whose rank the budget could choose"
        )


def _crushed(plan: Plan, resolved: Resolved) -> Iterator[str]:
    """Of a budget that is met by a small part of the model."""
    chosen = {open_site.site.name for open_site in resolved.open.get(None, ())}
    before = sum(step.params_before for step in plan.rewritten if step.name in chosen)
    after = sum(step.params_after for step in plan.rewritten if step.name in chosen)
    target = plan.target
    if target is None or target.unit != "params" or not before or before >= SMALL_PART * plan.params_before:
        return
    if after < target.ratio / 2 * before:
        part, left = before / plan.params_before, after / before
        yield (
            f"the budget {target} is met by cutting {percent(part)} of the parameters to {percent(left)} of "
            f"their size; it does not choose the other {percent(1 - part, up=True)}: match more layers or raise it"
        )


def _cut(rewritten: Sequence[Step], below_floor: int) -> Iterator[str]:
    """Of layers of which less than a tenth is left."""
    cut = sorted(
        (step.params_after / step.params_before, step.name)
        for step in rewritten
        if step.params_after < LITTLE * step.params_before
    )
    if cut:
        names = _named([f"{name} to {share:.1%}" for share, name in cut])
        floor = f"; {below_floor} of them below the default min_keep={FLOOR}" if below_floor else ""
        yield (
            f"{len(cut)} {'layer is' if len(cut) == 1 else 'layers are'} cut below a tenth of the parameters "
            f"({names}){floor}: raise the budget, keep them by a rule, or set min_keep"
        )


def _below_floor(plan: Plan, resolved: Resolved) -> int:
    """Returns the number of layers below the floor that an allocator holds where the budget allows it."""
    after = {step.name: step.params_after for step in plan.rewritten}
    sites = [open_site for sites in resolved.open.values() for open_site in sites if open_site.site.name in after]
    return sum(after[s.site.name] < s.floor * s.site.params for s in sites)


def _heads(model: nn.Module, steps: Sequence[Step]) -> Iterator[str]:
    """Of output heads whose rank is below their number of classes."""
    found = heads(model, steps)
    for step in steps:
        outputs, inputs = step.shape[0], step.shape[1]
        if step.name in found and step.decomposition is not None and rank_of(step) < outputs <= inputs:
            yield (
                f"{step.name}, an output head ({found[step.name]}), has rank {rank_of(step)} for {outputs} outputs, "
                f"which then span {rank_of(step)} of {outputs} dimensions: keep it by a rule before the others, "
                f"Rule('{step.name}', keep=True)"
            )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
