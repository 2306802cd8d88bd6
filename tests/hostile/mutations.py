"""Mutations of files, each a pure function of a seed: what a careless edit, a bad disk or an attacker would leave."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

DEEP = 100_000  # brackets; Python's parsers stop at about a thousand
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**9, 10**12, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "x",
        "0",
        "weight",
        "../../victim",
        "/etc/passwd",
        "\x00",
        "\ud800",
    ),
    *("x" * 5000, "float32", "low_rank", "*", "re:(a*)*b", "re:(", [], {}, [[]], [0], [-1], [10**12, 10**12], [None]),
    *({"x": 1}, {"low_rank": {"rank": 10**6}}, {"kronecker": {"terms": 10**6}}, {"tt_matrix": {"ranks": 10**6}}),
    *({"tucker": {"ranks": [10**6, 10**6]}}, {"nonsense": {}}, ["a", "a"], [1.5, "b"], {"": None}),
)
BODIES: tuple[bytes, ...] = (
    *(b"", b"\x00", b"{}", b"[]", b"null", b"nan", b"NaN", b'"text"', b"\xff\xfe\x00x", b"{", b"\xef\xbb\xbf{}"),
    *(
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b"9" * 10_000,
        b"1e400",
        b"-" * 1000,
        b"%",
        b"\t",
        b"a: b: c",
        b"&a [*a]",
        b"2001-99-99",
    ),
    b"!!python/object/apply:os.system ['true']",
)


def json_file(path: Path, rng: random.Random) -> None:
    """Change one or two places of a JSON file, or all of it."""
    if rng.random() < 0.15:
        _bytes(path, rng)
        return
    form = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(rng.choice((1, 1, 2))):
        form = changed(form, rng)
    text = json.dumps(form, ensure_ascii=True)
    if rng.random() < 0.05:
        text = text.replace("1", "1" * 5000, 1)
    path.write_text(text, encoding="utf-8")


def yaml_file(path: Path, rng: random.Random) -> None:
    """Change one or two places of a YAML file, or its text."""
    if rng.random() < 0.2:
        _bytes(path, rng)
        return
    if rng.random() < 0.15:
        path.write_text(_yaml_trick(path.read_text(encoding="utf-8"), rng), encoding="utf-8")
        return
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    for _ in range(rng.choice((1, 1, 2))):
        form = changed(form, rng)
    path.write_text(json.dumps(form), encoding="utf-8")  # which is YAML too, as far as it goes


def _yaml_trick(text: str, rng: random.Random) -> str:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
    )
    tricks = (
        bomb + text,
        text + "\nmore: &loop [*loop]\n",
        text.replace(": ", ": !!binary ", 1),
        text.replace(": ", ": 2001-02-30T99:99:99 # ", 1),
        text.replace(": ", ": 0x" + "f" * 5000 + " # ", 1),
        text.replace(": ", ": 1:1:1:1:1 # ", 1),
        "? [a, b]\n: c\n" + text,
        "--- 1\n--- 2\n" + text,
        "<<: {name: x}\n" + text,
        text.replace("match: ", "match: 're:(.*a){1,99}(.*b){1,99}$' # ", 1),
        text + "\n" + "- " * 5000,
        text * 400,
    )
    return rng.choice(tricks)


def changed(form: Any, rng: random.Random) -> Any:
    """Returns a JSON value with one place deleted, replaced, copied, swapped or renamed."""
    form = copy.deepcopy(form)
    places = list(_places(form))
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    act = rng.randrange(7)
    if act == 0:
        del holder[key]
    elif act == 1:
        other, name = rng.choice(places)
        holder[key] = (
            copy.deepcopy(other[name]) if name in (other if isinstance(other, dict) else range(len(other))) else 0
        )
    elif act == 2 and isinstance(holder, list):
        holder.extend(copy.deepcopy(holder[key]) for _ in range(rng.choice((1, 3, 1000))))
    elif act == 3 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "version", f"{key} ", str(key).upper()))] = holder.pop(key)
    elif act == 4 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice((-1, 2, 10**6, 1.5)) + rng.choice((0, 1, -1))
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return form


def _places(form: Any) -> Any:
    entries = form.items() if isinstance(form, dict) else enumerate(form) if isinstance(form, list) else ()
    for key, value in list(entries):
        yield form, key
        yield from _places(value)


def tensor_file(path: Path, rng: random.Random) -> None:
    """Change the header of a safetensors file, or its numbers."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    act = rng.randrange(7)
    if act == 0:
        _bytes(path, rng)
    elif act == 1:
        length = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63 - 1, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + data[8:])
    elif act == 2:
        body = bytearray(data)
        for _ in range(rng.choice((1, 8, 1000))):
            body[rng.randrange(8 + size, len(body))] = rng.randrange(256)
        path.write_bytes(bytes(body))
    elif act == 3:  # numbers that are NaN, infinite or huge, and indices out of range
        body = bytearray(data)
        start = 8 + size + 4 * rng.randrange(max(1, (len(body) - 8 - size) // 4 - 4))
        body[start : start + 4] = rng.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\x7f", b"\xff" * 4)
        )
        path.write_bytes(bytes(body))
    elif act == 4:
        header = json.loads(data[8 : 8 + size])
        _write(path, header, data[8 + size :] + b"\x00" * rng.choice((0, 1, 8)), changed(header, rng))
    elif act == 5:
        header = json.loads(data[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        if not names:
            _bytes(path, rng)
            return
        first, second = rng.choice(names), rng.choice(names)
        other = copy.deepcopy(header)
        trick = rng.randrange(4)
        if trick == 0:
            other[first], other[second] = header[second], header[first]
        elif trick == 1:
            other[first]["shape"] = list(reversed(other[first]["shape"]))
        elif trick == 2:
            other[first]["dtype"] = rng.choice(("I32", "F32", "F64", "BF16", "U8", "BOOL", "F8_E4M3", "X9"))
        else:
            other["more.weight"] = copy.deepcopy(header[first])
        _write(path, header, data[8 + size :], other)
    else:
        path.write_bytes(data[: rng.randrange(len(data))])


def _write(path: Path, _: Any, body: bytes, header: Any) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _bytes(path: Path, rng: random.Random) -> None:
    """Replace, cut or garble a file as a whole, or take it away."""
    data = path.read_bytes()
    act = rng.randrange(6)
    if act == 0:
        path.unlink()
        if rng.random() < 0.5:
            path.mkdir()
    elif act == 1:
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif act == 2 and data:
        body = bytearray(data)
        for _ in range(rng.choice((1, 3, 50))):
            body[rng.randrange(len(body))] = rng.randrange(256)
        path.write_bytes(bytes(body))
    elif act == 3:
        path.write_bytes(data + data)
    else:
        path.write_bytes(rng.choice(BODIES))


def number_file(path: Path, rng: random.Random) -> None:
    """Change numbers of a file of nothing else, or the whole of it."""
    if rng.random() < 0.5:
        _bytes(path, rng)
        return
    data = bytearray(path.read_bytes())
    start = 4 * rng.randrange(len(data) // 4)
    data[start : start + 4] = struct.pack("<I", rng.choice((0, 40, 10**6, 2**31 - 1, 2**31, 2**32 - 1)))
    path.write_bytes(bytes(data))


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    ".json": json_file,
    ".jsonl": json_file,
    ".i32": number_file,
    ".yaml": yaml_file,
    ".safetensors": tensor_file,
}


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of a folder; returns its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in MUTATIONS)
    weights = [4 if path.suffix == ".safetensors" or "token" not in path.name else 1 for path in files]
    path = rng.choices(files, weights)[0]
    try:
        MUTATIONS[path.suffix](path, rng)
    except (ValueError, UnicodeEncodeError):
        _bytes(path, rng)
    return str(path.relative_to(folder))
