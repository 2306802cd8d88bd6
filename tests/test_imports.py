"""``import tdkit`` loads little and changes nothing; modules import only from the packages below their own."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tdkit

# The packages and single modules of tdkit, lowest first. Each imports from itself and from lines above its own only.
ROOMS = """
    errors shapes
    registry
    support
    fitting products
    decompositions
    models
    sources
    calibration
    planning
    compression evaluation testing
    records
    sweeps
    public
    __init__
    recipes
    reporting
    cli
"""
FLOOR = {room: number for number, line in enumerate(ROOMS.strip().splitlines()) for room in line.split()}
PACKAGE = Path(tdkit.__file__).parent
# The packages that ``import tdkit`` may load besides the standard library, torch, numpy and what these load. Others,
# such as scipy, rich, transformers, triton and plugins, are imported by the functions that need them.
LEAN = {"tdkit", "safetensors", "yaml", "cython_runtime"}  # the last by yaml


def modules() -> dict[str, Path]:
    """Every module's name below ``tdkit``, a package by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of tdkit that a file imports, anywhere in it: an import inside a function hides a cycle."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {id(n) for block in ast.walk(tree) if _is_for_types_only(block) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    below = {name.removeprefix("tdkit.") for name in names if name.startswith("tdkit.")}
    found = below & set(known)
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def _is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


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
    if name.startswith("products.kernels."):
        pytest.importorskip("triton")
    if name == "models.lora":
        pytest.importorskip("peft")
    found: object = tdkit
    module = importlib.import_module("tdkit" if name == "__init__" else f"tdkit.{name}")
    for part in () if name == "__init__" else name.split("."):
        found = getattr(found, part)
    assert found is module


@pytest.mark.parametrize("name", sorted(room for room in FLOOR if (PACKAGE / room).is_dir()))
def test_every_package_says_in_one_line_what_it_is_for(name: str) -> None:
    tree = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
    lines = (ast.get_docstring(tree) or "").splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(".")


def in_a_new_process(code: str) -> Any:
    """What `code` prints as JSON, run by a new interpreter with the tests' warnings as errors."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_import_is_lean_and_without_traces() -> None:
    """The modules that it loads stand for its time, which depends on the machine."""
    seen = in_a_new_process(
        """
import json, os, random, sys, threading, warnings
import numpy, torch
def state():
    return {
        "dtype": str(torch.get_default_dtype()), "rng": torch.get_rng_state().sum().item(),
        "numpy": str(numpy.random.get_state()[1][:5]), "random": hash(random.getstate()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()],
        "environment": dict(os.environ), "grad": torch.is_grad_enabled(), "filters": len(warnings.filters),
        "cuda": torch.cuda.is_initialized(), "precision": torch.get_float32_matmul_precision(),
    }
before, loaded = state(), set(sys.modules)
import tdkit
new = set(sys.modules) - loaded
print(json.dumps({
    "packages": sorted({name.split(".")[0] for name in new} - set(sys.stdlib_module_names)),
    "torch": sorted(name for name in new if name.startswith("torch.")),
    "changed": sorted(key for key, value in state().items() if value != before[key]),
}))
"""
    )
    assert {name for name in seen["packages"] if not name.startswith("_")} <= LEAN
    assert seen["torch"] == [], "parts of torch that `import torch` leaves out, such as torch._dynamo, are slow to load"
    assert seen["changed"] == []


def test_import_waits_with_torch_until_a_name_is_used() -> None:
    seen = in_a_new_process(
        """
import json, sys
import tdkit
before = "torch" in sys.modules
from tdkit import Policy
print(json.dumps({"before": before, "after": "torch" in sys.modules, "same": tdkit.Policy is Policy,
    "missing": hasattr(tdkit, "no_such_name"), "all": sorted(set(tdkit.__all__) - set(dir(tdkit)))}))
"""
    )
    assert seen == {"before": False, "after": True, "same": True, "missing": False, "all": []}


def test_names_are_listed_without_importing_plugins() -> None:
    seen = in_a_new_process(
        """
import json, sys
import tdkit.decompositions.registered as registered
names = registered.decompositions.names()
print(json.dumps({"names": names, "plugins": sorted(name for name in sys.modules if name.startswith("tdkit_"))}))
"""
    )
    assert "low_rank" in seen["names"]
    assert seen["plugins"] == []


def test_every_public_name_exists() -> None:
    assert list(tdkit.__all__) == sorted(tdkit.__all__)
    assert all(hasattr(tdkit, name) for name in tdkit.__all__)
    assert tdkit.__version__
