"""Modules import only from the rooms below theirs; nothing is hidden by an object of its name; names are found."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import tdkit_distill

# The packages and single modules from the ground up. Each imports from the lines above its own, never from its own
# line (but from itself) or those below.
ROOMS = """
    errors
    data
    models
    losses
    teachers
    loop
    healing
    __init__
    steps recipes command
"""
FLOOR = {room: number for number, line in enumerate(ROOMS.strip().splitlines()) for room in line.split()}
PACKAGE = Path(tdkit_distill.__file__).parent


def modules() -> dict[str, Path]:
    """Every module's name below ``tdkit_distill``, a package by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this package that a file imports, anywhere in it: an import inside a function hides a cycle."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    below = {name.removeprefix("tdkit_distill.") for name in names if name.startswith("tdkit_distill.")}
    found = (below | ({"__init__"} if "tdkit_distill" in names else set())) & set(known)
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_package_has_its_floor() -> None:
    assert {room(name) for name in modules()} == set(FLOOR), f"bring ROOMS in {Path(__file__).name} up to date"


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_only_downward(name: str) -> None:
    known = modules()
    own = room(name)
    upward = {
        other for other in imported(known[name], known) if room(other) != own and FLOOR[room(other)] >= FLOOR[own]
    }
    assert not upward, f"{name} imports {', '.join(sorted(upward))}, which ROOMS does not place below it"


def test_no_modules_import_each_other() -> None:
    known = modules()
    waiting = {name: imported(path, known) - {name} for name, path in known.items()}
    while ready := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        for name in ready:
            del waiting[name]
    assert not waiting, f"these import each other: {', '.join(sorted(waiting))}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_module_is_hidden_by_another_object_of_its_name(name: str) -> None:
    found: object = tdkit_distill
    module = importlib.import_module("tdkit_distill" if name == "__init__" else f"tdkit_distill.{name}")
    for part in () if name == "__init__" else name.split("."):
        found = getattr(found, part)
    assert found is module


@pytest.mark.parametrize("name", sorted(room for room in FLOOR if (PACKAGE / room).is_dir()))
def test_every_package_says_in_one_line_what_it_is_for(name: str) -> None:
    tree = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
    lines = (ast.get_docstring(tree) or "").splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(".")


def test_every_public_name_exists() -> None:
    assert list(tdkit_distill.__all__) == sorted(tdkit_distill.__all__)
    assert all(hasattr(tdkit_distill, name) for name in tdkit_distill.__all__)
