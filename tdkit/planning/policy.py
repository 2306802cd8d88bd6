"""Which layers are rewritten, and how: rules in order, first match wins, as Python or as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from tdkit.errors import OptionError, PolicyError, RegistryError, did_you_mean
from tdkit.models.sites import Survey, survey
from tdkit.planning.allocators import allocators
from tdkit.planning.budget import Budget, check_ratio
from tdkit.planning.rule import Rule, refuse_unknown
from tdkit.planning.unmatched import unmatched
from tdkit.support.documents import parse_yaml, read_yaml

__all__ = ["Policy", "Rule"]

OPTIONS = ("budget", "allow_growth", "allocation", "min_keep")  # of a policy, besides its rules


@dataclass(frozen=True)
class Policy:
    """An ordered list of rules and the target size of the whole model.

    Args:
        rules: the first rule that selects a layer applies to it; layers that no rule selects stay dense.
        budget: params after / params before of the whole model, tied weights counted once. It is allocated to
            the selected layers whose decomposition has no rank set. Or a mapping with another unit: ``{"bytes": 0.3}``,
            the bytes of all tensors, or ``{"multiply_adds": 0.5}``, those of the products with weights. With ``dtype``
            ("float32", "float16", "bfloat16", "int8" or "int4") the result has that dtype, which its bytes follow;
            "int8" and "int4" round the factors and the dense weights, as `tdkit.quantize` does.
        allow_growth: permit factors with as many parameters as the dense weight or more.
        allocation: the allocator that shares the budget. ``uniform`` gives each layer the same share of its
            parameters; ``loss`` chooses the sizes with the least estimated loss, which needs a calibration with
            gradients; ``auto`` is ``loss`` with such a calibration and ``uniform`` otherwise. Other packages
            register more in the entry-point group ``tdkit.allocators``.
        min_keep: lower bound on params after / params before of each layer whose rank a budget chooses; a rule's own
            replaces it, and 0 means no bound. When None, the bound is `allocation.FLOOR`, below which the plan goes,
            with a warning, if the budget cannot be met otherwise.

    Raises:
        PolicyError: when an argument is invalid.
    """

    rules: Sequence[Rule]
    budget: float | Mapping[str, Any] | None = None
    allow_growth: bool = False
    allocation: str = "auto"
    min_keep: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rules, Rule) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise PolicyError("a policy's rules must be a list of Rule")
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules:
            raise PolicyError("a policy needs at least one rule")
        target = Budget.read(self.budget, "policy budget")
        object.__setattr__(self, "budget", None if target is None else target.form)
        check_ratio(self.min_keep, "policy min_keep", least=0)
        if not isinstance(self.allow_growth, bool):
            raise PolicyError(f"policy allow_growth={self.allow_growth!r} must be true or false")
        if self.allocation != "auto" and self.allocation not in (known := allocators.names()):
            raise PolicyError(
                f"policy allocation={self.allocation!r}{did_you_mean(str(self.allocation), known)}; "
                f"known: {', '.join(known)}"
            )

    @property
    def target(self) -> Budget | None:
        """The budget as an object."""
        return Budget.read(self.budget, "policy budget")

    def assign(self, found: Survey) -> dict[str, Rule]:
        """Returns the rule of each site, by site name, without the sites that no rule selects.

        Raises:
            PolicyError: when a rule selects no site, and the message suggests a similar name, or when a rule that is
                not a wildcard names a weight that cannot be rewritten.
        """
        problems = []
        for rule in self.rules:
            refused = [weight for weight in found.untouchable if any(rule.spells_out(name) for name in weight.names)]
            if rule.keep and any(rule.names_match(name) for weight in found.untouchable for name in weight.names):
                continue  # they are kept
            if not any(rule.selects(site) for site in found.sites):
                problems.append(unmatched(rule, found))
            elif refused and not rule.keep:
                reasons = "; ".join(f"{weight.name} ({weight.reason})" for weight in refused[:3])
                problems.append(f"rule '{rule.match}' names weights that cannot be rewritten: {reasons}")
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
        if self.min_keep is not None:
            form["min_keep"] = self.min_keep
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
            refuse_unknown(form, ("rules", *OPTIONS), "policy")
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
        options = {key: form[key] for key in OPTIONS if key in form}
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
            PolicyError: when the file cannot be read or the text is not YAML, or as `from_dict`.
        """
        place = f"policy file {text}" if isinstance(text, Path) else "the policy"
        try:
            form = read_yaml(text) if isinstance(text, Path) else parse_yaml(text)
        except (OSError, ValueError) as error:
            raise PolicyError(f"{place} cannot be read: {error}") from None
        return cls.from_dict(form)
