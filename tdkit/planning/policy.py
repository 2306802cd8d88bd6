"""Which layers are rewritten, and how: rules in order, first match wins, as Python or as YAML."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import OptionError, PolicyError, RegistryError, did_you_mean
from tdkit.models.sites import Site, Survey, survey
from tdkit.planning.allocators import allocators


@dataclass(frozen=True)
class Rule:
    """Selects layers by name, type, size or a predicate, and sets their decomposition or keeps them dense.

    Args:
        match: a glob over layer names (``*`` also matches dots), or ``re:`` followed by a regular expression that
            must match the whole name. A tied weight is matched by the name of any of its layers.
        decomposition: a decomposition, its name, or ``{name: {options}}``.
        keep: keep the selected layers dense.
        types: layer types to select, such as ``("Linear", "Embedding")``; all types when empty.
        min_params: minimum number of parameters of the dense weight.
        max_params: maximum number of parameters of the dense weight.
        where: a predicate on the `Site`; not available in YAML.
        budget: params after / params before of the selected layers together, instead of a share of the
            policy's budget.
        min_keep: lower bound on params after / params before of each layer whose rank is chosen from a budget.
        max_keep: upper bound, likewise.

    Raises:
        PolicyError: when an argument is invalid.
        OptionError, RegistryError: when the decomposition is invalid or unknown.
    """

    match: str
    decomposition: Decomposition | None = None
    _: KW_ONLY
    keep: bool = False
    types: tuple[str, ...] = ()
    min_params: int | None = None
    max_params: int | None = None
    where: Callable[[Site], bool] | None = field(default=None, compare=False)
    budget: float | None = None
    min_keep: float | None = None
    max_keep: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise PolicyError(f"rule match={self.match!r} must be a glob or 're:' and a regular expression")
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise PolicyError(f"rule '{self.match}' is not a regular expression: {error}") from None
        if self.decomposition is not None:
            object.__setattr__(self, "decomposition", decomposition(self.decomposition))
        if self.keep == (self.decomposition is not None):
            raise PolicyError(f"rule '{self.match}' must name a decomposition or say keep, not both or neither")
        if not isinstance(self.keep, bool):
            raise PolicyError(f"rule '{self.match}': keep={self.keep!r} must be true or false")
        given: object = self.types
        types = (given,) if isinstance(given, str) else given
        if not isinstance(types, list | tuple) or not all(isinstance(kind, str) for kind in types):
            raise PolicyError(f"rule '{self.match}': types={given!r} must be layer types, such as ['Linear']")
        object.__setattr__(self, "types", tuple(types))
        for option in ("min_params", "max_params"):
            value = getattr(self, option)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise PolicyError(f"rule '{self.match}': {option}={value!r} must be an integer")
        if self.min_params is not None and self.max_params is not None and self.min_params > self.max_params:
            raise PolicyError(
                f"rule '{self.match}': min_params={self.min_params} is above max_params={self.max_params}"
            )
        for option in ("budget", "min_keep", "max_keep"):
            check_ratio(getattr(self, option), f"rule '{self.match}': {option}")
        if self.min_keep is not None and self.max_keep is not None and self.min_keep > self.max_keep:
            raise PolicyError(f"rule '{self.match}': min_keep={self.min_keep} is above max_keep={self.max_keep}")

    def names_match(self, name: str) -> bool:
        """Returns whether the pattern matches a layer name."""
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.match)

    def selects(self, site: Site) -> bool:
        """Returns whether the rule applies to a site."""
        return (
            any(self.names_match(name) for name in site.names)
            and (not self.types or any(kind in self.types for kind in site.kinds))
            and (self.min_params is None or site.params >= self.min_params)
            and (self.max_params is None or site.params <= self.max_params)
            and (self.where is None or self.where(site))
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the YAML form.

        Raises:
            PolicyError: when the rule has a predicate, which cannot be written as YAML.
        """
        if self.where is not None:
            raise PolicyError(f"rule '{self.match}' has a predicate (where=), which cannot be written as YAML")
        form: dict[str, Any] = {"match": self.match}
        if self.decomposition is not None:
            spec = spec_of(self.decomposition)
            name, options = next(iter(spec.items()))
            form["with"] = spec if options else name
        if self.keep:
            form["keep"] = True
        if self.types:
            form["types"] = list(self.types)
        for option in ("min_params", "max_params", "budget", "min_keep", "max_keep"):
            if getattr(self, option) is not None:
                form[option] = getattr(self, option)
        return form

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Rule:
        """Returns a rule from its YAML form.

        Raises:
            PolicyError, OptionError, RegistryError: as the constructor, or for unknown keys.
        """
        if not isinstance(form, Mapping):
            raise PolicyError(f"a rule is 'match:' with 'with:' or 'keep: true', not {form!r}")
        known = ("match", "with", "keep", "types", "min_params", "max_params", "budget", "min_keep", "max_keep")
        _refuse_unknown(form, known, f"rule '{form.get('match', '?')}'")
        if "match" not in form:
            raise PolicyError(f"rule {dict(form)!r} lacks 'match'")
        options = {key: form[key] for key in known[2:] if key in form}
        if isinstance(options.get("types"), list):
            options["types"] = tuple(options["types"])
        return cls(form["match"], form.get("with"), **options)


@dataclass(frozen=True)
class Policy:
    """An ordered list of rules and the target size of the whole model.

    Args:
        rules: the first rule that selects a layer applies to it; layers that no rule selects stay dense.
        budget: params after / params before of the whole model, tied weights counted once. It is allocated to
            the selected layers whose decomposition has no rank set.
        allow_growth: permit factors with as many parameters as the dense weight or more.
        allocation: the allocator that shares the budget. ``uniform`` gives each layer the same share of its
            parameters; ``loss`` chooses the sizes with the least estimated loss, which needs a calibration with
            gradients; ``auto`` is ``loss`` with such a calibration and ``uniform`` otherwise. Other packages
            register more in the entry-point group ``tdkit.allocators``.

    Raises:
        PolicyError: when an argument is invalid.
    """

    rules: Sequence[Rule]
    budget: float | None = None
    allow_growth: bool = False
    allocation: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.rules, Rule) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise PolicyError("a policy's rules must be a list of Rule")
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules:
            raise PolicyError("a policy needs at least one rule")
        check_ratio(self.budget, "policy budget")
        if not isinstance(self.allow_growth, bool):
            raise PolicyError(f"policy allow_growth={self.allow_growth!r} must be true or false")
        if self.allocation != "auto" and self.allocation not in (known := allocators.names()):
            raise PolicyError(
                f"policy allocation={self.allocation!r}{did_you_mean(str(self.allocation), known)}; "
                f"known: {', '.join(known)}"
            )

    def assign(self, found: Survey) -> dict[str, Rule]:
        """Returns the rule of each site, by site name, without the sites that no rule selects.

        Raises:
            PolicyError: when a rule selects no site; the message suggests a similar name.
        """
        problems = []
        for rule in self.rules:
            if not any(rule.selects(site) for site in found.sites):
                problems.append(_unmatched(rule, found))
        if problems:
            raise PolicyError("\n".join(problems))
        assigned = {}
        for site in found.sites:
            first = next((rule for rule in self.rules if rule.selects(site)), None)
            if first is not None:
                assigned[site.name] = first
        return assigned

    def rewritten(self, model: nn.Module) -> list[str]:
        """Returns the names of the sites of `model` whose rule has a decomposition."""
        assigned = self.assign(survey(model))
        return [name for name, rule in assigned.items() if not rule.keep]

    def to_dict(self) -> dict[str, Any]:
        form: dict[str, Any] = {"rules": [rule.to_dict() for rule in self.rules]}
        if self.budget is not None:
            form["budget"] = self.budget
        if self.allow_growth:
            form["allow_growth"] = True
        if self.allocation != "auto":
            form["allocation"] = self.allocation
        return form

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Policy:
        """Returns a policy from its YAML form.

        Raises:
            PolicyError: when the form is invalid; lists the faults of all rules.
        """
        if not isinstance(form, Mapping):
            raise PolicyError("a policy is 'rules:' and, mostly, 'budget:'")
        problems = []
        try:
            _refuse_unknown(form, ("rules", "budget", "allow_growth", "allocation"), "policy")
        except PolicyError as error:
            problems.append(str(error))
        entries = form.get("rules") or []
        if not isinstance(entries, list | tuple):
            problems.append(f"a policy's 'rules' must be a list, not {entries!r}")
            entries = []
        rules = []
        for number, entry in enumerate(entries, 1):
            try:
                rules.append(Rule.from_dict(entry))
            except (PolicyError, OptionError, RegistryError) as error:
                problems.append(f"rule {number}: {error}")
        options = {key: form[key] for key in ("budget", "allow_growth", "allocation") if key in form}
        try:
            policy = cls(rules if rules or not problems else [Rule("*", keep=True)], **options)
        except PolicyError as error:
            problems.append(str(error))
        if problems:
            raise PolicyError("\n".join(problems))
        return policy

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str | Path) -> Policy:
        """Returns a policy from YAML text, or from a YAML file when given a `Path`.

        Raises:
            PolicyError: when the text is not YAML, or as `from_dict`.
        """
        if isinstance(text, Path):
            text = text.read_text(encoding="utf-8")
        try:
            form = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PolicyError(f"not YAML: {error}") from None
        return cls.from_dict(form)


def check_ratio(value: float | None, place: str) -> None:
    """Raise PolicyError unless `value` is None or params after / params before in (0, 1]."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise PolicyError(f"{place}={value!r} must be params after / params before, above 0 and at most 1")


def _refuse_unknown(form: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in form:
        if key not in known:
            raise PolicyError(f"{place}: unknown key '{key}'{did_you_mean(str(key), known)}; known: {', '.join(known)}")


def _unmatched(rule: Rule, found: Survey) -> str:
    by_name = [site for site in found.sites if any(rule.names_match(name) for name in site.names)]
    if by_name:
        kinds = sorted({kind for site in by_name for kind in site.kinds})
        sizes = [site.params for site in by_name]
        return (
            f"rule '{rule.match}' matches {len(by_name)} layers by name, but its types, size bounds or predicate "
            f"leave none (types {', '.join(kinds)}; {min(sizes):,} to {max(sizes):,} params)"
        )
    others = [layer for layer in found.untouchable if rule.names_match(layer.name)]
    if others:
        return f"rule '{rule.match}' matches only layers that cannot be rewritten: " + "; ".join(
            f"{layer.name} ({layer.reason})" for layer in others[:3]
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
