"""Regular expressions on names match as those of Python, in time that does not explode."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest

from tdkit.support.patterns import Expression

NAMES = ("", "a", "ab", "aab", "abc.0.fc", "model.layers.10.mlp.up_proj", "Ab", "a b", "a\n", "ß", "x1_y")
EXPRESSIONS = (
    *("", "a", ".*", "a|ab", "(a|b)*", "a?b+", "a{2}b", "a{1,}b?", "a{0,2}", "[ab]+", "[^a]+", "[a-z.0-9]+", r"\w+"),
    *(
        r".*\.\d+\..*",
        r"(?!lm_head).*",
        r"(?=a).*b",
        r".*(?<=b)",
        r".*(?<!b)",
        r"^a.*$",
        r"\Aab\Z",
        r".*\bfc\b",
        r".*\B.",
    ),
    *(r"(?i)AB", r"(?i)[A-B]+", r"(?s).*", r"\W+|\S*", r"[\d\s]*", r"(?:a|b)*?c?.*", "(a*)*b", "((a?)*)*", r"(?i)ß"),
    *("model\\.layers\\.(1|10)\\.(mlp|attn)\\..*", "(a|b|)*", "x{3}|x1_y", "(?P<part>a)b", "[^\\W_]+", "(?x) a b "),
)


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_it_matches_what_python_matches(text: str) -> None:
    for name in NAMES:
        assert Expression(text).matches(name) == (re.fullmatch(text, name) is not None), name


def test_random_expressions_match_what_python_matches() -> None:
    rng = random.Random(0)

    def made(depth: int) -> str:
        if depth == 0:
            return rng.choice(("a", "b", ".", "[ab]", "[^a]", "", r"\b"))
        parts = [made(depth - 1) for _ in range(rng.choice((1, 2, 3)))]
        kind = rng.randrange(4)
        if kind == 0:
            return f"({'|'.join(parts)})"
        if kind == 1:
            return f"({''.join(parts)}){rng.choice('*+?')}"
        if kind == 2:
            return f"({''.join(parts)}){{{rng.randrange(3)},{rng.randrange(3, 5)}}}"
        return "".join(parts)

    names = ["".join(letters) for size in range(5) for letters in itertools.product("ab", repeat=size)]
    for _ in range(300):
        text = made(2)
        found = Expression(text)
        assert [found.matches(name) for name in names] == [re.fullmatch(text, name) is not None for name in names], text


@pytest.mark.parametrize(
    "text", ["(a*)*b", "(a|a)*b", "(a|aa)+$b", "(.*a){1,99}b", "((a{1,1000}){1,1000}){1,1000}b", "(a?){1000000}b"]
)
def test_no_expression_takes_long(text: str) -> None:
    started = time.process_time()
    assert not Expression(text).matches("a" * 100)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r"(a)\1", "groupref is not supported"),
        ("a*+", "possessive repeat is not supported"),
        ("(?>a)", "atomic group is not supported"),
        ("(a)?(?(1)b|c)", "groupref exists is not supported"),
        ("(?i:a)", "subpattern is not supported"),
        ("(", "unterminated subpattern"),
        ("a{99999999999}", "repetition number is too large"),
        ("(" * 1000 + ")" * 1000, "nested|groups"),
        ("a" * 3000, "more than 2000 characters"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_not_supported_is_told(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Expression(text)
