"""Output through rich without interpretation of square brackets as markup or ``:names:`` as emoji.

All text that contains user input, such as layer names or prompts, is printed with this module.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def say(console: Console, text: str, style: str = "") -> None:
    """Print `text`, without interpretation of markup, in one style."""
    console.print(Text(text, style=style))


class PlainTable(Table):
    """A rich table that does not interpret markup in its title, headers and cells."""

    def __init__(self, *headers: Any, title: Any = None, **options: Any) -> None:
        super().__init__(*headers, **options)
        self.title = Text(title, style=self.title_style or "table.title") if isinstance(title, str) else title

    def add_column(self, header: Any = "", *arguments: Any, **options: Any) -> None:
        super().add_column(_plain(header), *arguments, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_plain, cells), **options)


def _plain(cell: Any) -> Any:
    return Text(cell) if isinstance(cell, str) else cell
