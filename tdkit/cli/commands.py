"""Commands of other packages: functions under the entry-point group ``tdkit.commands``, as typer takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from tdkit.registry import Registry

commands: Registry[Callable[..., None]] = Registry("tdkit.commands", "command", {})


def command_of(name: str) -> Any:
    """The command registered under a name, whose package is imported.

    Raises:
        RegistryError: when two packages provide it, or its package fails to import.
    """
    return _made(name, commands.get(name))


def listed(name: str) -> Any:
    """A stand-in for the list of commands, for which no package is imported."""

    def stand_in() -> None: ...

    stand_in.__doc__ = f"Of the package {' and '.join(commands.origins()[name])}."
    return _made(name, stand_in)


def _made(name: str, function: Callable[..., None]) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name)(function)
    return typer.main.get_command(app)
