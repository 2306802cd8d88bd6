"""Commands of other packages: functions under the entry-point group ``tdkit.commands``, as typer takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from tdkit.errors import RegistryError
from tdkit.registry import Registry
from tdkit.sources.source import not_callable

commands: Registry[Callable[..., None]] = Registry("tdkit.commands", "command", {}, not_callable)


def command_of(name: str) -> Any:
    """The command registered under a name, whose package is imported; one that cannot be had raises when it is run."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    try:
        app.command(name)(commands.get(name))
    except RegistryError as error:
        app.command(name, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(_raising(error))
    return typer.main.get_command(app)


def _raising(error: RegistryError) -> Callable[[], None]:
    def unavailable() -> None:
        raise error

    unavailable.__doc__ = f"Unavailable: {error}"
    return unavailable
