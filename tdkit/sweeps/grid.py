"""The points of a sweep: policies by name, given one by one or as a grid of what varies."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.registered import decomposition
from tdkit.errors import OptionError, TdkitError, did_you_mean
from tdkit.planning.policy import Policy
from tdkit.planning.rule import Rule
from tdkit.support.documents import parse_yaml

VARIED = ("with", "budget", "allocation", "min_keep")  # what a grid may vary


@dataclass(frozen=True)
class Point:
    """One policy of a sweep.

    Attributes:
        name: unique in the sweep, and the name of its file.
        policy: what the model is compressed by.
        varied: the values of the grid that made it, by what varies; empty for a policy that was given.
    """

    name: str
    policy: Policy
    varied: Mapping[str, Any] = field(default_factory=dict)


def points_of(
    policies: Sequence[Policy] | Mapping[str, Policy] | Mapping[str, Sequence[Any]],
    base: Policy | None = None,
    match: str | Sequence[str] = "*",
) -> list[Point]:
    """Returns the points of a sweep.

    Args:
        policies: a list of policies, or policies by name, or a grid such as ``{"with": ["low_rank", Auto()], "budget":
            [0.9, 0.8]}``, of which all combinations are points.
        base: the policy that a grid varies: ``with`` replaces the decomposition of its rules that have one, the others
            its options. When None, low rank on the layers of `match`.
        match: globs of the layers of a grid without `base`.

    Raises:
        OptionError: when there is no point, a grid varies something else, or a value is impossible; all faults are
            named together.
    """
    given: Any = [policies] if isinstance(policies, Policy) else policies
    if isinstance(given, Mapping) and not any(isinstance(value, Policy) for value in given.values()):
        found = _of_grid(given, base or _low_rank(match))
    else:
        named: list[tuple[Any, Any]]
        named = list(given.items()) if isinstance(given, Mapping) else [(_name_of(policy), policy) for policy in given]
        for name, policy in named:
            if not isinstance(policy, Policy):
                raise OptionError(f"sweep: point '{name}' is a {type(policy).__name__}, not a tdkit.Policy")
        found = [Point(_file_name(str(name)), policy) for name, policy in named]
    if not found:
        raise OptionError("sweep: there is no point: give at least one policy, or values such as budget=0.9,0.8")
    return _apart(found)


def read_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Returns a grid from texts such as ``budget=0.9,0.8`` and ``with=low_rank,{kronecker: {terms: 2}}``.

    Raises:
        OptionError: when one is no ``key=value,value`` in YAML.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, separator, values = text.partition("=")
        if not separator or not values.strip():
            raise OptionError(f"'{text}' must be KEY=VALUE,VALUE, such as budget=0.9,0.8 or with=low_rank,kronecker")
        try:
            axes[key] = parse_yaml(f"[{values}]")
        except ValueError as error:
            raise OptionError(f"'{text}': the values cannot be read: {error}") from None
    return axes


def _low_rank(match: str | Sequence[str]) -> Policy:
    globs = [match] if isinstance(match, str) else list(match)
    return Policy([Rule(glob, decomposition("low_rank")) for glob in globs or ["*"]])


def _of_grid(axes: Mapping[str, Any], base: Policy) -> list[Point]:
    faults = []
    for key, values in axes.items():
        if key not in VARIED:
            hint = did_you_mean(str(key), VARIED)
            faults.append(f"a sweep cannot vary '{key}'{hint}; it varies {', '.join(VARIED)}")
        elif isinstance(values, str) or not isinstance(values, Sequence) or not values:
            faults.append(f"{key}={values!r} must be a list of values")
    if faults:
        raise OptionError("\n".join(faults))
    found = []
    keys = [key for key in VARIED if key in axes]
    for values in itertools.product(*(axes[key] for key in keys)):
        varied = dict(zip(keys, values, strict=True))
        try:
            found.append(Point(_name(varied), _varied(base, varied), {k: _said(v) for k, v in varied.items()}))
        except TdkitError as error:
            faults.append(f"{_name(varied)}: {error}")
    if faults:
        raise OptionError("\n".join(faults))
    return found


def _varied(base: Policy, varied: Mapping[str, Any]) -> Policy:
    options = {key: value for key, value in varied.items() if key != "with"}
    rules = base.rules
    if "with" in varied:
        kind = decomposition(varied["with"])
        rules = tuple(rule if rule.keep else replace(rule, decomposition=kind) for rule in rules)
    return replace(base, rules=rules, **options)


def _said(value: Any) -> Any:
    """Returns a value as a number or a text."""
    if isinstance(value, Decomposition):
        return value.describe().removesuffix("()")
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _name(varied: Mapping[str, Any]) -> str:
    return _file_name(" ".join(str(_said(value)) for value in varied.values()))


def _name_of(policy: object) -> str:
    if not isinstance(policy, Policy):
        return type(policy).__name__
    kinds = dict.fromkeys(rule.decomposition.name for rule in policy.rules if rule.decomposition is not None)
    return " ".join([*kinds, *([] if policy.budget is None else [str(_said(policy.budget))])])


def _file_name(text: str) -> str:
    """Returns a text without characters that file names may not have."""
    return re.sub(r"[^\w.+=-]+", " ", text).strip(" .")[:100] or "point"


def _apart(points: Sequence[Point]) -> list[Point]:
    """Number points of one name."""
    seen: dict[str, int] = {}
    found = []
    for point in points:
        seen[point.name] = seen.get(point.name, 0) + 1
        number = seen[point.name]
        found.append(point if number == 1 else replace(point, name=f"{point.name} {number}"))
    return found
