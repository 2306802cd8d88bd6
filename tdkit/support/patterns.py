"""Regular expressions on names, matched in polynomial time whatever the expression is.

The engine of Python tries one way after the other, so that an expression of ten characters in a policy file, such as
``(a*)*b``, can take hours on a name of forty. Here the positions that each part of the expression can reach are
computed as sets, each once for every position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from tdkit.support.compatibility import parsed_expression

LONGEST = 2000  # characters of an expression

Ends = frozenset[int]

_NONE: Ends = frozenset()


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": _is_word,
}

_SINGLE = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN"})
_KNOWN = frozenset(
    {*_SINGLE, "BRANCH", "SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "AT", "ASSERT", "ASSERT_NOT", "CATEGORY"}
)


class Expression:
    """A regular expression in the syntax of ``re``, without references to groups, atomic and conditional parts.

    Args:
        text: the expression.

    Raises:
        ValueError: when it is none, is longer than `LONGEST`, or has such parts.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"it has more than {LONGEST} characters")
        try:
            self._tree, flags = parsed_expression(text)
            _check(self._tree)
        except (re.error, OverflowError) as error:
            raise ValueError(str(error)) from None
        except RecursionError:
            raise ValueError("it is too deeply nested") from None
        self._folds, self._lines = bool(flags & re.IGNORECASE), bool(flags & re.DOTALL)
        self._known: dict[str, bool] = {}

    def matches(self, name: str) -> bool:
        """Returns whether the expression matches the whole name."""
        if name not in self._known:
            self._known[name] = len(name) in _Matching(name, self._folds, self._lines).ends(self._tree, 0)
        return self._known[name]


@lru_cache(maxsize=256)
def expression(text: str) -> Expression:
    """Returns the `Expression` of a text."""
    return Expression(text)


def _check(tree: Iterable[Any]) -> None:
    for kind, value in tree:
        name = str(kind)
        if name not in _KNOWN or (name == "SUBPATTERN" and (value[1] or value[2])):
            raise ValueError(f"{name.lower().replace('_', ' ')} is not supported in layer names")
        for part in _parts(name, value):
            _check(part)


def _parts(name: str, value: Any) -> list[Any]:
    """Returns the expressions inside a part of one."""
    if name == "BRANCH":
        return list(value[1])
    if name in ("SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT"):
        return [value[-1]]
    return []


class _Matching:
    """One name and the positions that parts of an expression reach in it."""

    def __init__(self, name: str, folds: bool, lines: bool) -> None:
        self.name, self.folds, self.lines = name, folds, lines
        self._ends: dict[tuple[int, int], Ends] = {}

    def ends(self, tree: Any, start: int) -> Ends:
        """Returns the positions where a match of `tree` that begins at `start` can end."""
        key = (id(tree), start)
        if key not in self._ends:
            reached: Ends = frozenset({start})
            for kind, value in tree:
                reached = _NONE.union(*(self._step(str(kind), value, place) for place in reached))
                if not reached:
                    break
            self._ends[key] = reached
        return self._ends[key]

    def _step(self, kind: str, value: Any, place: int) -> Ends:
        if kind in _SINGLE:
            inside = place < len(self.name) and self._is(kind, value, self.name[place])
            return frozenset({place + 1}) if inside else _NONE
        if kind == "BRANCH":
            return _NONE.union(*(self.ends(part, place) for part in value[1]))
        if kind == "SUBPATTERN":
            return self.ends(value[-1], place)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeated(value, place)
        holds = self._at(str(value), place) if kind == "AT" else self._looks(value, place) == (kind == "ASSERT")
        return frozenset({place}) if holds else _NONE

    def _repeated(self, value: tuple[int, int, Any], place: int) -> Ends:
        least, most, part = value
        current: Ends = frozenset({place})
        for _ in range(least):
            following = _NONE.union(*(self.ends(part, each) for each in current))
            if following == current:
                break
            current = following
        reached, count = current, least
        while current and count < most:
            current = _NONE.union(*(self.ends(part, each) for each in current)) - reached
            reached, count = reached | current, count + 1
        return reached

    def _looks(self, value: Any, place: int) -> bool:
        """Returns whether an expression matches from here on, or up to here."""
        direction, part = value
        if direction > 0:
            return bool(self.ends(part, place))
        return any(place in self.ends(part, start) for start in range(place + 1))

    def _at(self, where: str, place: int) -> bool:
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return place == 0
        if where in ("AT_END", "AT_END_STRING"):
            return place == len(self.name)
        before = place > 0 and _is_word(self.name[place - 1])
        after = place < len(self.name) and _is_word(self.name[place])
        return (before != after) == (where == "AT_BOUNDARY")

    def _is(self, kind: str, value: Any, char: str) -> bool:
        forms = {char, char.lower(), char.upper()} if self.folds else {char}
        if kind == "ANY":
            return self.lines or char != "\n"
        if kind == "LITERAL":
            return any(ord(form) == value for form in forms if len(form) == 1)
        if kind == "NOT_LITERAL":
            return not self._is("LITERAL", value, char)
        inside, negated = False, False
        for what, item in value:
            name = str(what)
            if name == "NEGATE":
                negated = True
            elif name == "LITERAL":
                inside |= self._is("LITERAL", item, char)
            elif name == "RANGE":
                inside |= any(item[0] <= ord(form) <= item[1] for form in forms if len(form) == 1)
            else:
                category = str(item)
                inside |= _CATEGORIES[category.replace("_NOT_", "_")](char) != ("_NOT_" in category)
        return inside != negated
