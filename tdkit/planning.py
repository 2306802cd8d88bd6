"""From a policy to a plan: which rule applies to each matrix, and which rank the budget gives it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tdkit.budget import Choice, uniform
from tdkit.decompositions.base import Decomposition
from tdkit.errors import BudgetError, OptionError
from tdkit.layers import FactorizedLinear
from tdkit.plan import Plan, Step
from tdkit.policy import Policy, Rule
from tdkit.sites import Site, Survey, factorized_groups, num_params, survey


def plan(model: nn.Module, policy: Policy) -> Plan:
    """What `policy` would do to `model`; nothing is changed or fitted.

    Raises:
        PolicyError: when a rule matches nothing.
        OptionError: when options cannot be met by the layers they are meant for; all of them together.
        BudgetError: when the budget cannot be met.
    """
    found = survey(model)
    assigned = policy.assign(found)
    choices = _choose(model, policy, found, assigned)
    steps = []
    for site in found.sites:
        rule = assigned.get(site.name)
        if rule is None:
            choice = Choice(None, "no rule matches it")
        elif rule.keep:
            choice = Choice(None, f"kept by rule '{rule.match}'")
        else:
            choice = choices[site.name]
        steps.append(_step(site, choice, policy.allow_growth))
    before = num_params(model)
    after = before - sum(s.params_before - s.params_after for s in steps)
    return Plan(tuple(steps), before, after, {u.name: u.reason for u in found.untouchable}, policy.budget)


def applied_plan(model: nn.Module) -> Plan:
    """The plan that a model carries in itself: what was rewritten, into what, with which error."""
    steps = []
    for group in factorized_groups(model):
        matrix = group[0][1].matrix
        size = matrix.shape[0] * matrix.shape[1]
        times = sum(isinstance(layer, FactorizedLinear) for _, layer in group)
        steps.append(
            Step(
                names=tuple(name for name, _ in group),
                kinds=tuple(layer.replaces for _, layer in group),
                shape=matrix.shape,
                decomposition=matrix.decomposition,
                reason="",
                params_before=size,
                params_after=matrix.params,
                indices=matrix.indices,
                multiply_adds_before=times * size,
                multiply_adds_after=times * matrix.multiply_adds(),
                error=matrix.error,
            )
        )
    found = survey(model)
    steps += [_step(site, Choice(None, "dense"), allow_growth=False) for site in found.sites]
    after = num_params(model)
    before = after + sum(s.params_before - s.params_after for s in steps)
    return Plan(tuple(steps), before, after, {u.name: u.reason for u in found.untouchable})


def _choose(model: nn.Module, policy: Policy, found: Survey, assigned: Mapping[str, Rule]) -> dict[str, Choice]:
    fixed: dict[str, Choice] = {}
    open_sites: dict[str | None, list[tuple[Site, Decomposition]]] = {}  # by the rule that has a budget of its own
    problems = []
    for site in found.sites:
        rule = assigned.get(site.name)
        if rule is None or rule.decomposition is None:
            continue
        kind = rule.decomposition
        try:
            kind.check(site.shape)
        except OptionError as error:
            problems.append(f"{site.name}: {error}")
            continue
        if kind.is_complete():
            fixed[site.name] = Choice(kind)
        elif rule.budget is None and policy.budget is None:
            problems.append(f"{site.name}: {kind.describe()} leaves its rank open and there is no budget to choose it")
        else:
            open_sites.setdefault(rule.match if rule.budget is not None else None, []).append((site, kind))
    if problems:
        raise OptionError("\n".join(problems))

    choices = dict(fixed)
    for rule in policy.rules:
        if rule.budget is not None and rule.match in open_sites:
            sites = open_sites[rule.match]
            available = int(rule.budget * sum(site.params for site, _ in sites))
            choices |= uniform(sites, available, f"rule '{rule.match}' with budget={rule.budget}")
    if None in open_sites:
        assert policy.budget is not None
        sites = open_sites[None]
        elsewhere = num_params(model) - sum(site.params for site, _ in sites)
        for site in found.sites:
            if site.name in choices:
                elsewhere -= site.params - _step(site, choices[site.name], policy.allow_growth).params_after
        available = int(policy.budget * num_params(model)) - elsewhere
        place = f"policy budget={policy.budget}"
        if available <= 0:
            raise BudgetError(
                f"{place} cannot be met: what the open rules do not match already holds "
                f"{elsewhere / num_params(model):.3f} of the parameters"
            )
        choices |= uniform(sites, available, place)
    return choices


def _step(site: Site, choice: Choice, allow_growth: bool) -> Step:
    kind, reason = choice.decomposition, choice.reason
    params, indices, multiply_adds = site.params, 0, site.params
    if kind is not None:
        matrix = kind.empty(site.shape, device="meta")
        if matrix.params >= site.params and not allow_growth:
            reason = f"{kind.describe()} would hold {matrix.params:,} params, not fewer (allow_growth permits it)"
            kind = None
        else:
            params, indices, multiply_adds = matrix.params, matrix.indices, matrix.multiply_adds()
    times = site.multiplications()
    return Step(
        names=site.names,
        kinds=site.kinds,
        shape=site.shape,
        decomposition=kind,
        reason=reason,
        params_before=site.params,
        params_after=params,
        indices=indices,
        multiply_adds_before=times * site.params,
        multiply_adds_after=times * multiply_adds,
    )
