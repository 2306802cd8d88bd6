"""``tdkit doctor``: what tdkit finds on this machine."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points, version
from typing import Any

import typer

from tdkit.cli.output import AsJson, Command, show
from tdkit.support.tables import table_of

GROUPS = "tdkit."  # the first part of the names of the entry-point groups

BRINGS = {  # what an optional dependency of tdkit is for
    "hf": "models and datasets of Hugging Face, and everything on language models",
    "onnx": "tdkit export --to onnx",
    "peft": "LoRA adapters on compressed models",
    "lm-eval": "tdkit eval --tasks",
    "torchao": "factors and weights in 8 and 4 bits",
    "triton": "kernels for small batches on CUDA",
    "report": "reports with pictures",
    "demo": "the model and the texts of the shipped recipes",
    "dev": "the tests",
    "docs": "the documentation as a site",
}


def doctor(as_json: AsJson = False) -> None:
    """Say what is here: versions, devices, threads, memory, plugins and why they fail, extras that are missing.

    The exit code is 1 if a plugin fails to import.
    """
    from rich.console import Group

    versions, machine, plugins, extras = _versions(), _machine(), _plugins(), _extras()
    tables = [
        _table("versions", ["package", "version"], [[k, v or "not installed"] for k, v in versions.items()]),
        _table("this machine", ["what", "found"], [[k, str(v)] for k, v in machine.items()]),
        _table(
            "plugins",
            ["group", "name", "package", "state"],
            [[p["group"], p["name"], p["package"], p["error"] or "works"] for p in plugins],
        ),
        _table(
            "extras: pip install 'tdkit[NAME]'",
            ["name", "state", "brings"],
            [[e["name"], f"lacks {', '.join(e['missing'])}" if e["missing"] else "here", e["brings"]] for e in extras],
        ),
    ]
    found = {"versions": versions, "machine": machine, "plugins": plugins, "extras": extras}
    show(Group(*tables), found, as_json)
    if any(plugin["error"] for plugin in plugins):
        raise typer.Exit(1)


def _versions() -> dict[str, str | None]:
    from tdkit.evaluation.reports import PACKAGES
    from tdkit.support.version import installed_versions

    names = (*PACKAGES, "numpy", "safetensors", "triton", "torchao", "onnx", "peft", "accelerate")
    return {**dict.fromkeys(("python", *names)), **installed_versions(names)}


def _machine() -> dict[str, Any]:
    import torch

    from tdkit.support.memory import memory

    total, free = memory()
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "memory": _gigabytes(total),
        "memory free": _gigabytes(free),
    }
    for number in range(torch.cuda.device_count()):
        of_device = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{of_device.name}, {_gigabytes(of_device.total_memory)}"
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda or torch.version.hip else ": torch was built without it"
        found["cuda"] = f"none{built}"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found


def _gigabytes(count: int | None) -> str:
    return "not known" if count is None else f"{count / 2**30:.1f} GiB"


def _plugins() -> list[dict[str, str]]:
    """What other packages register, loaded as tdkit would."""
    groups = sorted(group for group in entry_points().groups if group.startswith(GROUPS))
    return [
        {
            "group": group,
            "name": entry.name,
            "package": f"{entry.dist.name} {entry.dist.version}" if entry.dist else "",
            "error": _fault(group, entry),
        }
        for group in groups
        for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)
    ]


def _fault(group: str, entry: EntryPoint) -> str:
    """Returns why an entry point cannot be used; empty when it can."""
    from tdkit.decompositions.registered import decompositions
    from tdkit.models.groups.registered import patterns
    from tdkit.models.hosts.registered import hosts
    from tdkit.planning.allocators import allocators
    from tdkit.recipes.recipe import steps
    from tdkit.registry import Registry
    from tdkit.sources.models import model_sources
    from tdkit.sources.texts import text_sources

    known: tuple[Registry[Any], ...] = (
        decompositions,
        hosts,
        patterns,
        allocators,
        steps,
        model_sources,
        text_sources,
    )
    registry = next((each for each in known if each.group == group), None)
    try:
        if registry is None:
            entry.load()
        else:
            registry.get(entry.name)
    except Exception as error:
        return f"{type(error).__name__}: {error}" if registry is None else str(error)
    return ""


def _extras() -> list[dict[str, Any]]:
    """The optional dependencies that the metadata of tdkit names, and which of their packages are not installed."""
    own = distribution("tdkit")
    needed: dict[str, list[str]] = {name: [] for name in own.metadata.get_all("Provides-Extra") or ()}
    for line in own.requires or ():
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w.-]+)['\"]", marker)
        package = re.match(r"[\w.-]+", requirement)
        elsewhere = re.search(r"platform_system == ['\"](\w+)['\"]", marker)
        if extra and package and not (elsewhere and elsewhere[1] != platform.system()):
            needed.setdefault(extra[1], []).append(package[0])
    return [
        {"name": name, "brings": BRINGS.get(name, ""), "missing": sorted(p for p in packages if not _installed(p))}
        for name, packages in sorted(needed.items())
    ]


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Any:
    table = table_of(title, columns, rows)
    for column in table.columns:
        column.justify = "left"
    return table


COMMANDS = (Command(doctor, "tdkit doctor"),)
