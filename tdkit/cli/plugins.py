"""``tdkit new-plugin``."""

from __future__ import annotations

from tdkit.cli.output import Command

COMMANDS: tuple[Command, ...] = ()
