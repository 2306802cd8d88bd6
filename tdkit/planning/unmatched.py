"""What the error for a rule that selects nothing says: why, and which similar name exists."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from tdkit.errors import did_you_mean
from tdkit.models.sites import Survey
from tdkit.planning.adapters import adapter_of
from tdkit.planning.rule import Rule


def unmatched(rule: Rule, found: Survey) -> str:
    """Returns the message of the error for a rule that selects no site."""
    by_name = [site for site in found.sites if any(rule.names_match(name) for name in site.names)]
    adapters = [site for site in by_name if not rule.keep and not rule.names_adapter(adapter_of(site))]
    if adapters and len(adapters) == len(by_name):
        return (
            f"rule '{rule.match}' matches only weights of an adapter, such as {adapters[0].name}: name the adapter in "
            f"the pattern ('*.{adapter_of(adapters[0])}.*') if they are to be factorised"
        )
    if by_name:
        kinds = sorted({kind for site in by_name for kind in site.kinds})
        sizes = [site.params for site in by_name]
        return (
            f"rule '{rule.match}' matches {len(by_name)} layers by name, but its types, size bounds or predicate "
            f"leave none (types {', '.join(kinds)}; {min(sizes):,} to {max(sizes):,} params)"
        )
    others = [layer for layer in found.untouchable if any(rule.names_match(name) for name in layer.names)]
    if others:
        return f"rule '{rule.match}' matches only layers that cannot be rewritten: " + "; ".join(
            f"{layer.name} ({layer.reason})" for layer in others[:3]
        )
    done = [name for name in found.factorized if rule.names_match(name)]
    if done:
        return (
            f"rule '{rule.match}' matches only weights that are factorised already ({', '.join(done[:3])}): compress "
            "the dense model"
        )
    names = [name for site in found.sites for name in site.names]
    return f"rule '{rule.match}' matched no layer{_suggest(rule.match, names)}"


def _suggest(pattern: str, names: Sequence[str]) -> str:
    """Returns a hint: `pattern` with unknown parts replaced by similar ones of the model, or a similar layer name."""
    parts = {part for name in names for part in name.split(".")}
    if pattern.startswith("re:"):
        return f". Layers are named like '{names[0]}'" if names else "; the model has no layer that can be rewritten"
    fixed = []
    for part in pattern.split("."):
        hint = did_you_mean(part, parts)
        literal = not any(c in part for c in "*?[")
        fixed.append(hint.split("'")[1] if literal and part not in parts and hint else part)
    suggestion = ".".join(fixed)
    if suggestion != pattern and any(fnmatch.fnmatchcase(name, suggestion) for name in names):
        return f"; did you mean '{suggestion}'?"
    near = did_you_mean(pattern, names)
    return near or (
        f". Layers are named like '{names[0]}'" if names else "; the model has no layer that can be rewritten"
    )
