"""The registry of patterns, by which groups are found in a model."""

from __future__ import annotations

from collections.abc import Sequence

from tdkit.errors import RegistryError
from tdkit.models.groups.group import Group, Pattern
from tdkit.models.groups.mlp import Mlp
from tdkit.models.sites import Site
from tdkit.registry import Registry

patterns: Registry[Sequence[Pattern]] = Registry(
    "tdkit.groups",
    "group pattern",
    {"mlp": "tdkit.models.groups.mlp:PATTERNS", "attention": "tdkit.models.groups.attention:PATTERNS"},
)


def groups_of(sites: Sequence[Site], shared: Sequence[str] = ()) -> list[Group]:
    """Returns the groups among sites, in their order; each site belongs to one group at most.

    Args:
        shared: names of weights that share hidden units, the consumer last; the registered patterns when empty.
    """
    known = {site.name: site for site in sites}
    tried: list[Pattern] = [Mlp(tuple(shared[:-1]), shared[-1])] if shared else _registered()
    found: dict[str, Group] = {}
    taken: set[str] = set()
    for pattern in tried:
        for group in pattern.find(known):
            names = {site.name for site in group.sites}
            if refusal(group) is None and not names & taken:
                taken |= names
                found[group.consumer.site.name] = group
    return [found[site.name] for site in sites if site.name in found]


def refusal(group: Group) -> str | None:
    """Returns why the weights of a group cannot be made smaller, or None."""
    for part in group.parts:
        user = part.site.users[0]
        if len(part.site.users) > 1:
            return f"{part.site.name} is shared with {part.site.names[1]}"
        if part.site.stacked or not user.host.resizes or user.weight != "weight":
            return f"{part.site.name} is a {user.kind}, whose size is not changed"
        if group.keeps_sizes and part.axis == 0 and part.bias is not None:
            return f"{part.site.name} has a bias, which would have to lose rows too"
    return None


def _registered() -> list[Pattern]:
    found: list[Pattern] = []
    for name in patterns.names():
        given = patterns.get(name)
        if not isinstance(given, list | tuple) or not all(isinstance(one, Pattern) for one in given):
            raise RegistryError(f"group pattern '{name}' must be a tuple of tdkit.models.groups.group.Pattern")
        found += given
    return found
