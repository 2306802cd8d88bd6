"""``tdkit new-plugin``: a package of one's own, to begin with."""

from __future__ import annotations

import keyword
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from tdkit.cli.output import Command, note
from tdkit.errors import OptionError

TEMPLATES = Path(__file__).with_name("templates")
NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
GROUPS = {"decomposition": "tdkit.decompositions", "host": "tdkit.hosts"}


def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the package, such as tdkit-circulant.")],
    host: Annotated[bool, typer.Option("--host", help="A layer type instead of a decomposition.")] = False,
    folder: Annotated[Path | None, typer.Option("--out", help="Where to write it; ./NAME by default.")] = None,
) -> None:
    """Write a package with a decomposition, or a host, that passes the contract of tdkit, to edit and install."""
    from tdkit.support.files import whole_folder, write_text

    kind = "host" if host else "decomposition"
    words = _words(name, kind)
    folder = folder or Path(name)
    if folder.exists():
        raise OptionError(f"{folder} exists: give another folder with --out")
    own, module = words["name"], words["module"]
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}/{own}.py": f"{kind}.py",
        "tests/conftest.py": "conftest.py",
        f"tests/test_{own}.py": f"test_{kind}.py",
    }
    with whole_folder(folder) as target:
        for path, template in files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            text = (TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")
            write_text(target / path, Template(text).substitute(words))
        write_text(target / module / "__init__.py", f'"""{words["what"]} for tdkit."""\n')
    note(f"wrote {folder}; try it: cd {folder} && python -m pytest; then: pip install -e {folder}")


def _words(package: str, kind: str) -> dict[str, str]:
    """Returns what stands for each name in the templates.

    Raises:
        OptionError: when the package cannot have this name.
    """
    if not NAME.fullmatch(package):
        raise OptionError(f"'{package}' is no name for a package: give small letters, digits and dashes")
    module = package.replace("-", "_")
    own = module.removeprefix("tdkit_")
    if keyword.iskeyword(own) or own[0].isdigit():
        raise OptionError(f"'{own}' cannot be the name of a module: give another name")
    if module in sys.stdlib_module_names or find_spec(module) is not None:
        raise OptionError(f"there is a package '{module}' already: give another name, such as tdkit-{own}")
    if own in _taken(kind):
        raise OptionError(f"there is a {kind} '{own}' already (tdkit {_LISTED[kind]}): give another name")
    class_name = "".join(part.capitalize() for part in own.split("_"))
    return {
        "package": package,
        "module": module,
        "name": own,
        "class_name": class_name,
        "object": f"{class_name}Host" if kind == "host" else class_name,
        "group": GROUPS[kind],
        "what": f"The {kind} {own}",
    }


_LISTED = {"decomposition": "decompositions lists them", "host": "doctor lists those of other packages"}


def _taken(kind: str) -> set[str]:
    """Returns the names that are registered."""
    if kind == "host":
        from tdkit.models.hosts.registered import hosts

        return set(hosts.names())
    from tdkit.decompositions.registered import decompositions

    return set(decompositions.names())


COMMANDS = (Command(new_plugin, "tdkit new-plugin tdkit-circulant"),)
