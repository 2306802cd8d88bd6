"""Texts of any kind are values or a ValueError, within a second or two."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdkit.support.documents import parse_json, parse_yaml, read_json, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_yaml, BOMB, "its aliases stand for 1e.* values, more than 100,000"),
        (parse_yaml, "a: &a [*a]", "an alias stands for a value that contains it"),
        (parse_yaml, "a: &a {b: *a}", "an alias stands for a value that contains it"),
        (parse_yaml, "[" * 5000, "too deeply nested"),
        (parse_yaml, "a: 2001-02-30", "day is out of range"),
        (parse_yaml, "a: 0x" + "f" * 5000, "an integer of 5,002 digits"),
        (parse_yaml, "!!python/object/apply:os.getpid []", "could not determine a constructor"),
        (parse_yaml, "? {a: b}\n: c", "it is not YAML"),
        (parse_yaml, "a: b: c", "it is not YAML"),
        (parse_yaml, "a: [1,\n", "it is not YAML"),
        (parse_yaml, "a\x00b", "it is not YAML"),
        (parse_yaml, "x" * 2**19, "more than 131,072 characters"),
        (parse_json, "[" * 100_000, "too deeply nested"),
        (parse_json, '{"a":' * 100_000, "too deeply nested"),
        (parse_json, "9" * 5000, "an integer of 5,000 digits"),
        (parse_json, r'{"a": "\ud800"}', "surrogates not allowed"),
        (parse_yaml, r'a: ["\ud800"]', "surrogates not allowed"),
        (parse_json, "{", "Expecting property name"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_every_text_is_a_value_or_a_value_error(parse: Callable[[str], Any], text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        parse(text)
    assert len(str(caught.value)) < 1000
    assert time.process_time() - started < 2


def test_files_that_are_not_utf_8_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xff\xfea")
    for read in (read_json, read_yaml):
        with pytest.raises(ValueError, match="can't decode"):
            read(path)


def test_aliases_and_ordinary_values_are_read() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}") == {"a": [1, 2], "b": [1, 2], "c": {"d": 1}}
    assert parse_yaml("") is None
    assert parse_json('{"a": [1, -2, 3.5, null]}') == {"a": [1, -2, 3.5, None]}
