"""Commands of other packages: functions under the entry-point group ``tdkit.commands``, as typer takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from tdkit.errors import RegistryError
from tdkit.registry import Registry
from tdkit.support.plugins import PROVIDED


def _not_callable(_: str, found: object) -> str | None:
    return None if callable(found) else f"{found!r} is not a callable"


commands: Registry[Callable[..., None]] = Registry("tdkit.commands", "command", {}, _not_callable)


class ProvidedCommand(TyperCommand):
    """A command of another package, imported when it is called: the list of all commands needs none of them."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return _loaded(str(self.name)).make_context(info_name, args, parent=parent, **extra)


def command_of(name: str) -> Any:
    """Returns the command registered under a name; one that cannot be had raises when it is called."""
    summary = (
        PROVIDED[name].summary if name in PROVIDED else f"Of the package {' and '.join(commands.origins()[name])}."
    )
    return _command(name, lambda: None, cls=ProvidedCommand, help=summary)


def _loaded(name: str) -> Any:
    try:
        return _command(name, commands.get(name))
    except RegistryError as error:
        return _command(
            name, _raising(error), context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
        )


def _command(name: str, function: Callable[..., None], **options: Any) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name, **options)(function)
    return typer.main.get_command(app)


def _raising(error: RegistryError) -> Callable[[], None]:
    def unavailable() -> None:
        raise error

    unavailable.__doc__ = f"Unavailable: {error}"
    return unavailable
