"""``python -m tests.lowest``: print constraints that pin every declared dependency to the lowest version declared.

PyPI has the lowest torch for Linux on x86-64 as a CUDA build only, which brings several GB and runs on a CPU as well.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECTS = (ROOT / "pyproject.toml", ROOT / "plugins" / "tdkit-distill" / "pyproject.toml")


def requirements(project: Path) -> Iterator[Requirement]:
    """Yields every requirement of a project and of its extras, but those on tdkit itself."""
    form = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    for group in (form["dependencies"], *form.get("optional-dependencies", {}).values()):
        yield from (each for each in map(Requirement, group) if each.name != "tdkit")


def lowest() -> dict[str, str]:
    """Returns the lowest version by name that all projects allow, of those that declare one."""
    found: dict[str, Version] = {}
    for project in PROJECTS:
        for requirement in requirements(project):
            for bound in requirement.specifier:
                name, version = canonicalize_name(requirement.name), Version(bound.version)
                found[name] = max(version, found.get(name, version))
    return {name: str(version) for name, version in sorted(found.items())}


def main() -> None:
    """Print them."""
    for name, version in lowest().items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
