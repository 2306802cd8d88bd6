"""Commands of other packages: functions under the entry-point group ``tdkit.commands``, as typer takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from tdkit.registry import Registry
from tdkit.sources.source import not_callable

commands: Registry[Callable[..., None]] = Registry("tdkit.commands", "command", {}, not_callable)


def command_of(name: str) -> Any:
    """The command registered under a name, imported when it is asked for.

    Raises:
        RegistryError: when two packages provide it, or its package fails to import.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name)(commands.get(name))
    return typer.main.get_command(app)
