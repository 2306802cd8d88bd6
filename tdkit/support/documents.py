"""Texts in JSON and YAML from files that anybody may have written: values, or a ``ValueError`` that says why not.

The parsers alone raise half a dozen other exceptions (for nesting, for the digits of an integer, for dates, for keys
that cannot be compared), and a YAML text of a few lines can stand for 10^9 values through its aliases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

MOST_JSON = 2**26  # characters; the descriptions of the largest models have a few million
MOST_YAML = 2**17  # characters; the parser reads about a hundred thousand in a second
MOST_DIGITS = 40  # of an integer, which must become a float in messages and ratios
MOST_VALUES = 10**5  # that a YAML text stands for, once its aliases are written out


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file.

    Raises:
        OSError: when the file cannot be read.
        ValueError: when it is not UTF-8 or not JSON, or too large or too deeply nested.
    """
    return parse_json(read_text(path, MOST_JSON))


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: when it is not JSON, or too large or too deeply nested.
    """
    _check_length(text, MOST_JSON)
    try:
        value = json.loads(text, parse_int=_integer)
        if "\\u" in text:
            _check_texts(value)
        return value
    except RecursionError:
        raise ValueError("it is too deeply nested") from None


def read_yaml(path: Path) -> Any:
    """Returns the value of a YAML file.

    Raises:
        OSError: when the file cannot be read.
        ValueError: when it is not UTF-8, or as `parse_yaml`.
    """
    return parse_yaml(read_text(path))


def read_text(path: Path, most: int = MOST_YAML) -> str:
    """Returns the text of a UTF-8 file.

    Raises:
        OSError: when the file cannot be read.
        ValueError: when it is not UTF-8, or has more than `most` characters.
    """
    with path.open(encoding="utf-8") as file:
        text = file.read(most + 1)
    _check_length(text, most)
    return text


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML text.

    Raises:
        ValueError: when it is not YAML, is too large or too deeply nested, or stands for too many values.
    """
    _check_length(text, MOST_YAML)
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            count = _values_in(node, {})
            if count > MOST_VALUES:
                raise ValueError(f"its aliases stand for {count:.0e} values, more than {MOST_VALUES:,}")
            value = loader.construct_document(node)
            if "\\" in text:
                _check_texts(value)
            return value
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is too deeply nested") from None
    except (yaml.YAMLError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"it is not YAML: {error}") from None


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """Returns the number of values that a node stands for; one that contains itself is refused."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias stands for a value that contains it")
        return known[id(node)]
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int"):
        _check_digits(node.value)
    known[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_values_in(part, known) for part in parts)
    return known[id(node)]


def _check_texts(value: Any) -> None:
    """Raise ``UnicodeEncodeError``, a ``ValueError``, for halves of characters, which escapes can stand for."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_texts(key)
            _check_texts(part)
    elif isinstance(value, list):
        for part in value:
            _check_texts(part)


def _integer(text: str) -> int:
    _check_digits(text)
    return int(text)


def _check_digits(text: str) -> None:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"it has an integer of {len(text):,} digits")


def _check_length(text: str, most: int) -> None:
    if len(text) > most:
        raise ValueError(f"it has more than {most:,} characters")
