"""Make a plan from a policy: find the rule of each matrix and choose ranks within the budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tdkit.calibration.batches import Batch
from tdkit.calibration.calibration import Calibration, Loss
from tdkit.calibration.losses import Labels
from tdkit.calibration.measure import measured, text_batches
from tdkit.calibration.runner import Runner
from tdkit.decompositions.auto import Auto
from tdkit.decompositions.shrink import Shrink
from tdkit.errors import BudgetError, CalibrationError
from tdkit.models.sites import Site, factorized_groups, num_bytes, num_params, resized_layers, survey
from tdkit.planning.adapters import adapter_of
from tdkit.planning.allocation import Choice, OpenSite
from tdkit.planning.allocators import Request, allocate
from tdkit.planning.budget import UNITS, Budget, Costs, dense_bytes, factor_bytes, left_bytes, other_bytes
from tdkit.planning.factorised import estimated_loss, factorised_instead
from tdkit.planning.grouping import tested
from tdkit.planning.plan import Plan
from tdkit.planning.policy import Policy
from tdkit.planning.resolution import Resolved, resolve, without
from tdkit.planning.rule import Rule
from tdkit.planning.shrunk_steps import bundle_steps, resized_step
from tdkit.planning.site_steps import applied_step, site_step
from tdkit.planning.step import Step
from tdkit.planning.warnings import warnings_of, warnings_of_applied
from tdkit.support.compatibility import uncompiled
from tdkit.support.processes import failing_together


def plan(
    model: nn.Module,
    policy: Policy,
    *,
    calibration: Calibration | Iterable[Batch] | str | Path | None = None,
    loss: Loss | None = None,
    progress: bool | None = None,
) -> Plan:
    """Returns the plan of `policy` for `model`, without changing the model.

    Args:
        model: any torch module.
        policy: the rules and the budget.
        calibration: a result of `calibrate`, or batches or the name of a text to calibrate on. With gradients, the
            budget is allocated by estimated loss, for which the error curve of every layer is computed.
        loss: a function (model output, batch) -> scalar tensor for the batches; see `calibrate`.
        progress: show a progress bar; when None, only on a terminal.

    Raises:
        PolicyError: when a rule matches nothing.
        OptionError: when options do not fit the layers they apply to; lists all such layers.
        BudgetError: when the budget cannot be met.
        CalibrationError: as `calibrate`.
    """
    resolved = resolve(model, policy)
    return planned(resolved, calibrated(resolved, calibration, loss=loss, progress=progress), progress=progress)


def calibrated(
    resolved: Resolved,
    given: Calibration | Iterable[Batch] | str | Path | None,
    *,
    gradients: bool = True,
    loss: Loss | None = None,
    labels: Labels = "data",
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Calibration | None:
    """Returns `given` if it is a calibration, else one of the sites to rewrite, measured on the batches `given`.

    Returns None when nothing is given or no site is to be rewritten.

    Args:
        gradients, loss, labels, device: as in `calibrate`.

    Raises:
        CalibrationError: when there is a `loss` and no batches to apply it to; else as `calibrate`.
    """
    if loss is not None and (given is None or isinstance(given, Calibration)):
        what = "there are none" if given is None else "the calibration has been measured with a loss already"
        raise CalibrationError(f"loss= is for the batches of calibration=, and {what}: give batches, or leave it out")
    if given is None or isinstance(given, Calibration):
        return given
    sites = resolved.rewritten
    if not sites:
        return None
    batches = text_batches(given, None) if isinstance(given, str | Path) else given
    runner = Runner(resolved.model, gradients=gradients, loss=loss, labels=labels)
    return measured(runner, sites, batches, device=device, progress=progress)


def planned(resolved: Resolved, calibration: Calibration | None = None, *, progress: bool | None = None) -> Plan:
    """Returns the plan of a resolved policy; see `plan`. A resolved plan is returned unchanged."""
    if resolved.plan is not None:
        return resolved.plan
    policy = resolved.policy
    assert policy is not None
    with failing_together():
        resolved = _with_tested_groups(resolved, calibration)
        choices = _choose(resolved, policy, calibration, progress)
        other = factorised_instead(resolved)
        if other is not None and not math.isnan(loss := estimated_loss(resolved, choices)):
            factorised = _choose(other, policy, calibration, progress)
            if estimated_loss(other, factorised) < loss:
                resolved, choices = other, factorised
    shrunk: dict[str, Step] = {}
    for name, bundle in resolved.bundles.items():
        shrunk |= bundle_steps(bundle, choices[name], calibration)
    steps = []
    for site in resolved.survey.sites:
        rule = resolved.rules.get(site.name)
        if site.name in shrunk:
            steps.append(shrunk[site.name])
            continue
        if rule is None:
            choice = Choice(None, _unselected(site, policy))
        elif rule.keep:
            choice = Choice(None, f"kept by rule '{rule.match}'")
        else:
            choice = choices[site.name]
        steps.append(site_step(site, choice, policy.allow_growth))
    before = num_params(resolved.model)
    after = before - sum(s.params_before - s.params_after for s in steps)
    made = Plan(
        tuple(steps),
        before,
        after,
        resolved.survey.untouchable,
        policy.budget,
        bytes_before=num_bytes(resolved.model),
        bytes_after=_bytes_after(resolved, steps, policy.target),
    )
    return replace(made, warnings=warnings_of(made, resolved))


def _with_tested_groups(resolved: Resolved, calibration: Calibration | None) -> Resolved:
    """Returns `resolved` without the groups that cannot be shrunk; those of an `Auto` need a calibration to be tried.

    Raises:
        CalibrationError: when a rule asks for `Shrink` alone and there are no calibration batches.
    """
    groups = [group for bundle in resolved.bundles.values() for group in bundle.groups]
    if calibration is None or not calibration.batches:
        optional = [g for g in groups if isinstance(resolved.rules[g.name].decomposition, Auto)]
        faults = {group.name: "there are no calibration batches" for group in optional}
        faults |= tested([group for group in groups if group.name not in faults], calibration)
    else:
        faults = tested(groups, calibration)
    return without(resolved, faults) if faults else resolved


def _unselected(site: Site, policy: Policy) -> str:
    """Returns why no rule selects a site."""
    part = adapter_of(site)
    if part is not None and any(rule.names_match(name) for rule in policy.rules for name in site.names):
        return f"it belongs to an adapter ({part}), which only a rule that names it rewrites"
    return "no rule matches it"


def applied_plan(model: nn.Module) -> Plan:
    """Returns the plan of a compressed model, read from its layers: decompositions, parameters and errors."""
    model = uncompiled(model)
    steps = {
        (users[0].layer, users[0].weight): applied_step(matrix, users) for matrix, users in factorized_groups(model)
    }
    found = survey(model)
    resized = {name: dense for name, _, dense in resized_layers(model)}
    for site in found.sites:
        dense = resized.get(site.users[0].layer)
        step = (
            site_step(site, Choice(None, "dense"), allow_growth=False) if dense is None else resized_step(site, dense)
        )
        steps[site.users[0].layer, site.users[0].weight] = step
    places = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    ordered = [steps[key] for key in sorted(steps, key=lambda key: places[key[0]])]
    after = num_params(model)
    before = after + sum(s.params_before - s.params_after for s in ordered)
    size = num_bytes(model)
    made = Plan(tuple(ordered), before, after, found.untouchable, bytes_after=size)
    return replace(made, warnings=warnings_of_applied(made, model))


def _choose(
    resolved: Resolved, policy: Policy, calibration: Calibration | None, progress: bool | None
) -> dict[str, Choice]:
    choices = dict(resolved.fixed)
    for number, rule in enumerate(policy.rules):
        if rule.budget is not None and number in resolved.open:
            sites = resolved.open[number]
            before, after = _settled(resolved, rule, choices, sites, policy.allow_growth)
            whole = before + sum(s.site.params for s in sites)
            available = int(rule.budget * whole) - after
            place = f"rule '{rule.match}' with budget={rule.budget}"
            if available <= 0:
                raise BudgetError(
                    f"{place} cannot be met: the weights whose size it does not choose hold {after / whole:.3f} of the "
                    "params that it selects: raise the budget or match more layers"
                )
            choices |= allocate(policy.allocation, Request(sites, available, place, calibration, progress))
    if None in resolved.open:
        target = policy.target
        assert target is not None
        sites, bundles = resolved.open[None], resolved.bundles
        costs = Costs(target.unit, target.dtype, calibration)
        every = resolved.survey.sites
        whole, elsewhere = costs.whole(resolved.model, every), costs.rest(resolved.model, every)
        opened = {open_site.site.name for open_site in sites}
        together = {site.name for bundle in bundles.values() for site in bundle.sites}
        for site in every:
            if site.name in together:
                elsewhere += costs.of(site)
            elif site.name not in opened:
                choice = choices.get(site.name, Choice(None))
                elsewhere += costs.of(site, site_step(site, choice, policy.allow_growth).decomposition)
        for name, bundle in bundles.items():  # with their biases, but without rows of other units
            chosen = 0 if name in opened else costs.of(bundle, choices[name].decomposition)
            elsewhere += chosen - costs.of(bundle)
        available = int(target.ratio * whole) - elsewhere
        place = f"policy budget={policy.budget}"
        if available <= 0:
            lost = sum(weight.params for weight in resolved.survey.untouchable) / num_params(resolved.model)
            raise BudgetError(
                f"{place} cannot be met: what the open rules do not match already holds "
                f"{elsewhere / whole:.3f} of the {UNITS[target.unit]}"
                + (f", {lost:.3f} of the params are in weights that cannot be rewritten" if lost else "")
                + ": raise the budget or match more layers"
            )
        choices |= allocate(policy.allocation, Request(sites, available, place, calibration, progress, costs))
    return choices


def _settled(
    resolved: Resolved, rule: Rule, choices: Mapping[str, Choice], sites: Sequence[OpenSite], allow_growth: bool
) -> tuple[int, int]:
    """Returns the parameters, before and after, of what a rule selects and whose size its budget does not choose."""
    opened = {each.site.name for each in sites}
    before = after = 0
    bundled: set[str] = set()
    for name, bundle in resolved.bundles.items():
        bundled |= {site.name for site in bundle.sites}
        if name not in opened and resolved.rules.get(bundle.sites[0].name) is rule:
            before += bundle.params
            after += Costs().of(bundle, choices[name].decomposition)
    for site in resolved.survey.sites:
        if resolved.rules.get(site.name) is rule and site.name not in opened | bundled:
            before += site.params
            after += site_step(site, choices[site.name], allow_growth).params_after
    return before, after


def _bytes_after(resolved: Resolved, steps: Sequence[Step], target: Budget | None) -> int:
    """Returns the bytes of all tensors after compression."""
    dtype = None if target is None else target.dtype
    sites = resolved.survey.sites
    size = other_bytes(resolved.model, sites, dtype)
    for site, step in zip(sites, steps, strict=True):
        kind = step.decomposition
        if isinstance(kind, Shrink):
            size += left_bytes(site, step.params_before - step.params_after, dtype)
        else:
            size += dense_bytes(site, dtype) if kind is None else factor_bytes(site, kind, dtype)
    return size
