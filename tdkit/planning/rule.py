"""One rule of a policy: which layers it selects, and what becomes of them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import PolicyError, did_you_mean
from tdkit.models.sites import Site
from tdkit.planning.adapters import adapter_of
from tdkit.planning.budget import check_ratio
from tdkit.support.patterns import expression


@dataclass(frozen=True)
class Rule:
    """Selects layers by name, type, size or a predicate, and sets their decomposition or keeps them dense.

    Args:
        match: a glob over layer names (``*`` also matches dots), or ``re:`` followed by a regular expression without
            references to groups, which must match the whole name. A tied weight is matched by the name of any of its
            layers.
        decomposition: a decomposition, its name, or ``{name: {options}}``.
        keep: keep the selected layers dense.
        types: layer types to select, such as ``("Linear", "Conv2d")``, by the name of the layer's class or of one that
            it is derived from; all types when empty.
        min_params: minimum number of parameters of the dense weight.
        max_params: maximum number of parameters of the dense weight.
        where: a predicate on the `Site`; not available in YAML.
        budget: params after / params before of the selected layers together, instead of a share of the
            policy's budget.
        min_keep: lower bound on params after / params before of each layer whose rank is chosen from a budget; 0 for
            none, that of the policy when None.
        max_keep: upper bound, likewise.

    The weights of an adapter (LoRA and others of peft) are selected only if the pattern names the adapter, as in
    ``*.lora_A.*``, or if the rule keeps them.

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
                expression(self.match[3:])
            except ValueError as error:
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
            check_ratio(
                getattr(self, option), f"rule '{self.match}': {option}", least=0 if option == "min_keep" else None
            )
        if self.min_keep is not None and self.max_keep is not None and self.min_keep > self.max_keep:
            raise PolicyError(f"rule '{self.match}': min_keep={self.min_keep} is above max_keep={self.max_keep}")

    def names_match(self, name: str) -> bool:
        """Returns whether the pattern matches a layer name."""
        if self.match.startswith("re:"):
            return expression(self.match[3:]).matches(name)
        return fnmatch.fnmatchcase(name, self.match)

    def spells_out(self, name: str) -> bool:
        """Returns whether the pattern matches a layer name and contains the whole of it, without wildcards."""
        pattern = self.match[3:].replace("\\", "") if self.match.startswith("re:") else self.match
        return self.names_match(name) and re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", pattern) is not None

    def selects(self, site: Site) -> bool:
        """Returns whether the rule applies to a site."""
        return (
            any(self.names_match(name) for name in site.names)
            and (not self.types or any(user.is_of(self.types) for user in site.users))
            and (self.min_params is None or site.params >= self.min_params)
            and (self.max_params is None or site.params <= self.max_params)
            and (self.where is None or self.where(site))
            and (self.keep or self.names_adapter(adapter_of(site)))
        )

    def names_adapter(self, part: str | None) -> bool:
        """Returns whether the pattern contains the part of a name that marks an adapter, or its prefix, or is None."""
        return part is None or part in self.match or f"{part.partition('_')[0]}_" in self.match

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
        refuse_unknown(form, known, f"rule '{form.get('match', '?')}'")
        if "match" not in form:
            raise PolicyError(f"rule {dict(form)!r} lacks 'match'")
        options = {key: form[key] for key in known[2:] if key in form}
        if isinstance(options.get("types"), list):
            options["types"] = tuple(options["types"])
        return cls(form["match"], form.get("with"), **options)


def refuse_unknown(form: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in form:
        if key not in known:
            raise PolicyError(f"{place}: unknown key '{key}'{did_you_mean(str(key), known)}; known: {', '.join(known)}")
