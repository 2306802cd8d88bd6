"""Which weights a policy or a plan shrinks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdkit.calibration.calibration import Calibration
from tdkit.calibration.grouping import faults_of
from tdkit.decompositions.auto import Auto
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.shrink import Shrink
from tdkit.errors import CalibrationError, PolicyError
from tdkit.models.groups.group import Bundle, Group
from tdkit.models.groups.registered import groups_of, refusal
from tdkit.models.sites import Site
from tdkit.planning.rule import Rule
from tdkit.planning.step import Step


def shrink_of(kind: Decomposition | None) -> Shrink | None:
    """Returns the `Shrink` that a rule's decomposition is, or that an `Auto` chooses from; None without one."""
    members = kind.members if isinstance(kind, Auto) else (kind,)
    return next((member for member in members if isinstance(member, Shrink)), None)


def groups_by_rule(sites: Sequence[Site], rules: Mapping[str, Rule]) -> list[tuple[Group, Rule]]:
    """Returns the groups of sites that one rule matches all of and may shrink, in the order of the sites.

    An `Auto` shrinks layers to smaller ones only. Queries, keys and values it leaves to its other members: on
    SmolLM2-135M they were better of low rank.
    """
    found: list[tuple[Group, Rule]] = []
    for rule in {id(rule): rule for rule in rules.values()}.values():
        kind = shrink_of(rule.decomposition)
        if kind is not None:
            own = [site for site in sites if rules.get(site.name) is rule]
            groups = groups_of(own, kind.shared)
            found += [(g, rule) for g in groups if not (g.keeps_sizes and isinstance(rule.decomposition, Auto))]
    places = {site.name: place for place, site in enumerate(sites)}
    return sorted(found, key=lambda pair: places[pair[0].name])


def bundles_of(pairs: Sequence[tuple[Group, Rule]]) -> list[tuple[Bundle, Rule]]:
    """Returns the groups that keep the same number of units together, each with its rule: all alike, if uniform."""
    bundles: dict[object, tuple[list[Group], Rule]] = {}
    for group, rule in pairs:
        kind = shrink_of(rule.decomposition)
        assert kind is not None
        alike = Bundle((group,)).shape, group.heads, group.combines, group.consumer.axis
        key = (id(rule), *alike) if kind.uniform else (group.name,)
        bundles.setdefault(key, ([], rule))[0].append(group)
    return [(Bundle(tuple(groups)), rule) for groups, rule in bundles.values()]


def tested(groups: Sequence[Group], calibration: Calibration | None) -> dict[str, str]:
    """Returns why groups cannot be shrunk, by their names, found by running the model on a calibration batch.

    Raises:
        CalibrationError: when there are groups and no batches.
    """
    if not groups:
        return {}
    if calibration is None or not calibration.batches:
        raise CalibrationError(
            "shrink removes hidden units by their effect on calibration batches, and runs one of them to test that "
            "nothing else depends on these units: give calibration= with its batches"
        )
    return faults_of(groups[0].consumer.site.users[0].model, groups, calibration.batches[0])


def shrunk_groups(pairs: Sequence[tuple[Step, Site]]) -> list[tuple[Group, Shrink]]:
    """Returns the groups of the steps whose decomposition is a `Shrink`, each with it.

    Raises:
        PolicyError: when such steps form no groups in this model, or those of a group differ.
    """
    kinds: dict[str, Shrink] = {}
    for step, site in pairs:
        if isinstance(step.decomposition, Shrink):
            kinds[site.name] = step.decomposition
    found: list[tuple[Group, Shrink]] = []
    for shared in dict.fromkeys(kind.shared for kind in kinds.values()):
        sites = [site for _, site in pairs if site.name in kinds and kinds[site.name].shared == shared]
        for group in groups_of(sites, shared):
            own = [kinds[site.name] for site in group.sites]
            why = refusal(group)
            if why is not None:
                raise PolicyError(f"the plan shrinks {group.name}, and {why}")
            if any(kind != own[0] for kind in own) or (own[0].units or 0) > group.units:
                names = ", ".join(site.name for site in group.sites)
                raise PolicyError(f"the plan's steps of {names} must keep the same number of the {group.units} units")
            found.append((group, own[0]))
    lost = kinds.keys() - {site.name for group, _ in found for site in group.sites}
    if lost:
        raise PolicyError(
            f"the plan shrinks {', '.join(sorted(lost)[:3])} without all the weights that share their hidden units: "
            "plan again for this model"
        )
    return found
