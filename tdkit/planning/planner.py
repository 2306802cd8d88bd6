"""From a policy to a plan: which rule applies to each matrix, and which rank the budget gives it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from tdkit.calibration.calibration import Batch, Calibration
from tdkit.calibration.losses import Labels
from tdkit.calibration.measure import calibrate
from tdkit.decompositions.auto import Auto
from tdkit.decompositions.base import FactorizedMatrix, Point
from tdkit.errors import BudgetError, OptionError, PolicyError
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.models.sites import Site, Survey, factorized_groups, num_params, survey
from tdkit.planning.allocation import Choice, OpenSite, mixed, uniform
from tdkit.planning.plan import Plan, Step
from tdkit.planning.policy import Policy, Rule
from tdkit.support.processes import shared
from tdkit.support.progress import progress_bar


def plan(
    model: nn.Module,
    policy: Policy,
    *,
    calibration: Calibration | Iterable[Batch] | str | Path | None = None,
    progress: bool | None = None,
) -> Plan:
    """What `policy` would do to `model`; nothing is changed.

    Args:
        calibration: what `calibrate` returned, or what it takes. With it the budget can go where the loss
            needs it, which takes the error curve of every layer.
        progress: show a progress bar; on a terminal only when None.

    Raises:
        PolicyError: when a rule matches nothing.
        OptionError: when options cannot be met by the layers they are meant for; all of them together.
        BudgetError: when the budget cannot be met.
    """
    known = calibrated(model, policy, calibration, progress=progress)
    found = survey(model)
    assigned = policy.assign(found)
    choices = _choose(model, policy, found, assigned, known, progress)
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
                paths=_paths_of(matrix) if times else None,
            )
        )
    found = survey(model)
    steps += [_step(site, Choice(None, "dense"), allow_growth=False) for site in found.sites]
    after = num_params(model)
    before = after + sum(s.params_before - s.params_after for s in steps)
    return Plan(tuple(steps), before, after, {u.name: u.reason for u in found.untouchable})


def calibrated(
    model: nn.Module,
    policy: Policy | Plan,
    given: Calibration | Iterable[Batch] | str | Path | None,
    *,
    labels: Labels = "data",
    progress: bool | None = None,
) -> Calibration | None:
    """The calibration that was given, or one measured on the batches that were, of what `policy` rewrites.

    A fault of the policy is told before the model runs. `labels` are those of `calibrate`.
    """
    if given is None or isinstance(given, Calibration):
        return given
    if isinstance(policy, Policy):
        found = survey(model)
        assigned = policy.assign(found)
        _sorted(policy, found, assigned)
        names = [name for name, rule in assigned.items() if not rule.keep]
    else:
        names = [step.name for step in policy.rewritten]
    return calibrate(model, given, names=names, labels=labels, progress=progress) if names else None


def _sorted(
    policy: Policy, found: Survey, assigned: Mapping[str, Rule]
) -> tuple[dict[str, Choice], dict[int | None, list[OpenSite]]]:
    """The sites whose rule says all, and those whose rank a budget chooses: by id of the rule that has its own."""
    fixed: dict[str, Choice] = {}
    open_sites: dict[int | None, list[OpenSite]] = {}
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
            open_site = OpenSite(site, kind, rule.min_keep, rule.max_keep)
            open_sites.setdefault(id(rule) if rule.budget is not None else None, []).append(open_site)
    if problems:
        raise OptionError("\n".join(problems))
    return fixed, open_sites


def _choose(
    model: nn.Module,
    policy: Policy,
    found: Survey,
    assigned: Mapping[str, Rule],
    calibration: Calibration | None,
    progress: bool | None,
) -> dict[str, Choice]:
    fixed, open_sites = _sorted(policy, found, assigned)
    allocate = _Allocation(policy.allocation, calibration, progress)
    choices = dict(fixed)
    for rule in policy.rules:
        if rule.budget is not None and id(rule) in open_sites:
            sites = open_sites[id(rule)]
            available = int(rule.budget * sum(s.site.params for s in sites))
            choices |= allocate(sites, available, f"rule '{rule.match}' with budget={rule.budget}")
    if None in open_sites:
        assert policy.budget is not None
        sites = open_sites[None]
        elsewhere = num_params(model) - sum(s.site.params for s in sites)
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
        choices |= allocate(sites, available, place)
    return choices


class _Allocation:
    """Shares a budget among sites the way that a policy and its calibration ask for."""

    def __init__(self, allocation: str, calibration: Calibration | None, progress: bool | None) -> None:
        two_sided = calibration is not None and calibration.gradients
        if allocation == "loss" and not two_sided:
            raise PolicyError(
                "policy allocation='loss' estimates the loss from a calibration with gradients: give calibration=, "
                "measured with gradients=True, or use allocation='uniform'"
            )
        self.by_loss = two_sided and allocation != "uniform"
        self.calibration = calibration
        self.progress = progress

    def __call__(self, sites: list[OpenSite], available: int, place: str) -> dict[str, Choice]:
        known = set(self.calibration.names) if self.calibration else set()
        unreached = [s for s in sites if s.site.name not in known]
        if not self.by_loss or len(unreached) == len(sites):
            return uniform(sites, available, place, self.calibration)
        choices: dict[str, Choice] = {}
        if unreached:  # no batch says how much they matter: they get the share of all
            share = available / sum(s.site.params for s in sites)
            part = int(share * sum(s.site.params for s in unreached))
            choices = uniform(unreached, part, f"{place}, for the layers that the calibration did not reach,")
            available -= part
        reached = [s for s in sites if s.site.name in known]
        return choices | mixed(reached, self._curves(reached), available, place)

    def _curves(self, sites: list[OpenSite]) -> dict[str, list[Point]]:
        assert self.calibration is not None
        calibration = self.calibration

        def curve(open_site: OpenSite) -> list[Point]:
            site, kind = open_site.site, open_site.kind
            bar.now(site.name)
            every = kind.members_of(site.shape) if isinstance(kind, Auto) else [kind]
            return [point for one in every for point in calibration.curve(site, one)]

        curves = {}
        with progress_bar("error curves", len(sites), self.progress) as bar:
            for open_site, points in zip(sites, shared(sites, curve), strict=True):
                curves[open_site.site.name] = points
                bar.advance()
        return curves


def _step(site: Site, choice: Choice, allow_growth: bool) -> Step:
    kind, reason = choice.decomposition, choice.reason
    params, indices, multiply_adds, paths = site.params, 0, site.params, None
    if kind is not None:
        matrix = kind.empty(site.shape, device="meta")
        if matrix.params >= site.params and not allow_growth:
            reason = f"{kind.describe()} would hold {matrix.params:,} params, not fewer (allow_growth permits it)"
            kind = None
        else:
            params, indices, multiply_adds = matrix.params, matrix.indices, matrix.multiply_adds()
            paths = _paths_of(matrix) if site.multiplications() else None
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
        loss=None if choice.error is None else choice.error / 2,
        runner_up=None
        if kind is None or choice.runner_up is None
        else f"{choice.runner_up.decomposition.describe()}: {choice.runner_up.error / 2:.3g}",
        paths=paths,
    )


def _paths_of(matrix: FactorizedMatrix) -> tuple[str, str]:
    """The names of the paths that are cheapest for 1 and for 512 tokens."""
    few, many = (min(matrix.paths(tokens), key=lambda path: path.seconds()) for tokens in (1, 512))
    return few.name, many.name
