"""Match a policy or a plan to the weights of a model, once for calibration, planning and compression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from torch import Tensor, nn

from tdkit.decompositions.auto import Auto
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.shrink import Shrink
from tdkit.decompositions.stacked import stacked
from tdkit.errors import OptionError, PolicyError
from tdkit.models.groups.group import Bundle
from tdkit.models.sites import Site, Survey, User, survey, uninitialized
from tdkit.planning.allocation import FLOOR, Choice, OpenSite
from tdkit.planning.grouping import bundles_of, groups_by_rule, shrink_of
from tdkit.planning.plan import Plan
from tdkit.planning.policy import Policy
from tdkit.planning.rule import Rule
from tdkit.planning.step import Step
from tdkit.shapes import Shape, by
from tdkit.support.compatibility import uncompiled


@dataclass(frozen=True)
class Resolved:
    """A policy or a plan, matched to the weights of a model.

    Attributes:
        model: the model.
        survey: the weights of the model.
        policy: the policy; None when a plan was given.
        rules: by site name, the rule that applies to the site.
        fixed: by site name, the choices that need no budget: of rules whose decomposition has its rank set, and of
            weights that cannot become smaller.
        open: the sites, and bundles of groups, whose size is chosen from a budget. The key is the index of the rule
            whose own budget applies, or None for the budget of the policy.
        plan: the plan to follow; None when there is none yet.
        bundles: by name, the groups of weights that are to be shrunk together. `fixed` and `open` have the bundle in
            the place of its sites, under its name.
    """

    model: nn.Module
    survey: Survey
    policy: Policy | None
    rules: Mapping[str, Rule]
    fixed: Mapping[str, Choice]
    open: Mapping[int | None, list[OpenSite]]
    plan: Plan | None = None
    bundles: Mapping[str, Bundle] = field(default_factory=dict)

    @property
    def rewritten(self) -> tuple[Site, ...]:
        """The sites that are to be replaced by a decomposition."""
        if self.plan is not None:
            return tuple(site for _, site in self.pairs(self.plan))
        settled = {name for name, choice in self.fixed.items() if choice.decomposition is None}
        names = {name for name, rule in self.rules.items() if not rule.keep} - settled
        return tuple(site for site in self.survey.sites if site.name in names)

    def following(self, plan: Plan) -> Resolved:
        """Returns a copy that follows `plan`, which was made from this object, instead of making a new plan.

        Raises:
            PolicyError: when the plan belongs to another model.
        """
        self.pairs(plan)
        return replace(self, plan=plan)

    def pairs(self, plan: Plan) -> list[tuple[Step, Site]]:
        """Returns the steps of a plan that replace a weight, each with its site.

        Raises:
            PolicyError: when the plan belongs to another model.
        """
        by_name = {site.name: site for site in self.survey.sites}
        pairs = []
        for step in plan.rewritten:
            site = by_name.get(step.name)
            if site is None or site.names != step.names or site.shape != step.shape:
                raise PolicyError(
                    f"the plan's layer {step.name} ({by(step.shape)}) is not in this model: plan again for this model"
                )
            pairs.append((step, site))
        return pairs


def resolve(model: nn.Module, policy: Policy | Plan, read: Callable[[User], Tensor] | None = None) -> Resolved:
    """Survey `model` and assign the rules of `policy`, or find the layers of a plan.

    Args:
        read: returns the weight of a layer, where the model does not hold its values.

    Raises:
        PolicyError: when a rule matches nothing, the plan belongs to another model, or an argument has a wrong type.
        OptionError: when options fit none of the layers they apply to, or not one that a rule names, or a rank is not
            set and there is no budget; lists all such layers.
    """
    if not isinstance(model, nn.Module):
        raise PolicyError(f"the model is a {type(model).__name__}, not a torch.nn.Module: give the model itself")
    model = uncompiled(model)
    lazy = uninitialized(model)
    if lazy:
        raise PolicyError(
            f"the shapes of {', '.join(lazy[:3])} are not known yet: run a batch through the model, then compress it"
        )
    found = survey(model, read)
    if isinstance(policy, Plan):
        resolved = Resolved(model, found, None, {}, {}, {}, policy)
        resolved.pairs(policy)
        return resolved
    if not isinstance(policy, Policy):
        raise PolicyError(_no_policy(policy))
    return _resolved(model, found, policy, policy.assign(found), {})


def without(resolved: Resolved, faults: Mapping[str, str]) -> Resolved:
    """Returns `resolved` without some groups, given by name with the reason: each of their weights is on its own.

    Raises:
        OptionError: as `resolve`.
    """
    assert resolved.policy is not None
    return _resolved(resolved.model, resolved.survey, resolved.policy, resolved.rules, faults)


def _resolved(
    model: nn.Module, found: Survey, policy: Policy, rules: Mapping[str, Rule], faults: Mapping[str, str]
) -> Resolved:
    pairs = groups_by_rule(found.sites, rules)
    alone = {site.name: f"not shrunk: {faults[g.name]}" for g, _ in pairs if g.name in faults for site in g.sites}
    bundles = bundles_of([(group, rule) for group, rule in pairs if group.name not in faults])
    fixed, open_sites = _sorted(policy, found, rules, bundles, alone)
    return Resolved(
        model, found, policy, rules, fixed, open_sites, None, {bundle.name: bundle for bundle, _ in bundles}
    )


def decomposition_at(site: Site, kind: Decomposition) -> Decomposition:
    """Returns what the decomposition of a rule stands for at a single site: at a stack of matrices, itself for each.

    Raises:
        OptionError: when a decomposition of stacks is given for another weight, or one of groups.
    """
    kind = _of_single_weights(kind)
    if site.stacked:
        return stacked(kind)
    if kind.stacks:
        raise OptionError(f"{kind.describe()} is for stacks of matrices, such as experts; this weight is none")
    return kind


def _kind_at(site: Site | Bundle, kind: Decomposition) -> Decomposition:
    """Returns what the decomposition of a rule stands for at a site or, of groups, at a bundle."""
    if isinstance(site, Site):
        return decomposition_at(site, kind)
    shrink = shrink_of(kind)
    assert shrink is not None
    return shrink


def _of_single_weights(kind: Decomposition) -> Decomposition:
    """Returns `kind`.

    Raises:
        OptionError: when it is only for groups.
    """
    members = kind.members if isinstance(kind, Auto) else (kind,)
    if all(isinstance(member, Shrink) for member in members):
        raise OptionError("it shares no hidden units with other weights that the same rule matches")
    return kind


def _no_policy(given: object) -> str:
    remedy = {
        Rule: "put it into one: Policy([rule], budget=...)",
        dict: "read it with Policy.from_dict(...)",
        str: "read it with Policy.from_yaml(...)",
        list: "put the rules into one: Policy(rules, budget=...)",
    }
    found = (text for kind, text in remedy.items() if isinstance(given, kind))
    hint = next(found, "build a tdkit.Policy or a tdkit.Plan")
    return f"a {type(given).__name__} is no policy: {hint}"


def _sorted(
    policy: Policy,
    found: Survey,
    assigned: Mapping[str, Rule],
    bundles: Sequence[tuple[Bundle, Rule]],
    alone: Mapping[str, str],
) -> tuple[dict[str, Choice], dict[int | None, list[OpenSite]]]:
    """Returns the choices that need no budget, and the sites and bundles whose size is chosen from a budget.

    Args:
        bundles: the groups that are shrunk together, each bundle with its rule.
        alone: by site name, why a weight is not shrunk with others.
    """
    fixed: dict[str, Choice] = {}
    open_sites: dict[int | None, list[OpenSite]] = {}
    problems: list[str] = []
    unbudgeted: dict[str, list[str]] = {}
    unmet: list[
        tuple[Site | Bundle, Rule, str]
    ] = []  # the options of a rule that a site's shape does not allow, and why
    met: set[int] = set()  # the rules whose options another site's shape allows
    shrinks: dict[tuple[int, Shape, int], bool] = {}  # by rule, shape and size
    together = {site.name for bundle, _ in bundles for site in bundle.sites}
    targets: list[tuple[Site | Bundle, Rule | None]] = [
        *((site, assigned.get(site.name)) for site in found.sites if site.name not in together),
        *bundles,
    ]
    for site, rule in targets:
        if rule is None or rule.decomposition is None:
            continue
        named = isinstance(site, Bundle) or any(rule.spells_out(name) for name in site.names)
        try:
            kind = _kind_at(site, rule.decomposition)
        except OptionError as error:
            if named:
                problems.append(f"{site.name}: {alone.get(site.name, error)}")
            else:
                fixed[site.name] = Choice(None, alone.get(site.name, str(error)))
            continue
        problem = _problem(kind, site)
        if problem is not None and not named and isinstance(site, Site):
            reason = _unfit(rule.decomposition, site)
            if reason is not None:
                fixed[site.name] = Choice(None, reason)
                continue
        if problem is not None:
            unmet.append((site, rule, problem))
            continue
        met.add(id(rule))
        key = id(rule), site.shape, site.params
        if key not in shrinks:
            shrinks[key] = kind.is_complete() or policy.allow_growth or _can_shrink(kind, site)
        if not shrinks[key]:
            fixed[site.name] = Choice(None, _no_smaller(rule.decomposition))
            continue
        if kind.is_complete():
            fixed[site.name] = Choice(kind)
        elif rule.budget is None and policy.budget is None:
            unbudgeted.setdefault(kind.describe(), []).append(site.name)
        else:
            least = policy.min_keep if rule.min_keep is None else rule.min_keep
            floor = min(FLOOR, rule.max_keep or 1.0) if least is None else 0.0
            open_site = OpenSite(site, kind, least, rule.max_keep, floor)
            place = next(number for number, own in enumerate(policy.rules) if own is rule)
            open_sites.setdefault(place if rule.budget is not None else None, []).append(open_site)
    for site, rule, problem in unmet:
        if id(rule) in met and not any(rule.spells_out(name) for name in site.names):
            fixed[site.name] = Choice(None, problem)
        else:
            problems.append(f"{site.name}: {problem}")
    for what, names in unbudgeted.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        problems.append(
            f"{', '.join(names[:3])}{more}: {what} leaves its rank open and no budget chooses it: give "
            "Policy(budget=...), Rule(budget=...) or the option itself (--budget on the command line)"
        )
    if problems:
        raise OptionError("\n".join(problems))
    return fixed, open_sites


def _problem(kind: Decomposition, site: Site | Bundle) -> str | None:
    """Returns why a decomposition has no choice for a site, or None."""
    try:
        kind.check(kind.shape_of(site.shape))
    except OptionError as error:
        return str(error)
    return None


def _unfit(kind: Decomposition, site: Site) -> str | None:
    """Returns why no decomposition of this type is for a site, or None when its options are at fault.

    A pattern with wildcards matches such weights too: they stay dense, for this reason.
    """
    unset = replace(kind, **{each.name: None for each in fields(kind) if each.default is None})
    try:
        kind = decomposition_at(site, unset)
        kind.shape_of(site.shape)
    except OptionError as error:
        return str(error)
    problem = _problem(kind, site)
    if (problem and unset.options()) or (not problem and _can_shrink(kind, site)):
        return None
    return _no_smaller(unset)


def _no_smaller(kind: Decomposition) -> str:
    return f"no {kind.name} decomposition holds fewer parameters"


def _can_shrink(kind: Decomposition, site: Site | Bundle) -> bool:
    """Returns whether a choice holds fewer parameters than the dense weight."""
    shape, most = kind.shape_of(site.shape), site.params - 1
    return any(each.complete(each.shape_of(shape), most) is not None for each in kind.alternatives(shape))
