"""Text for rich as it is: square brackets are not read as markup, nor ``:names:`` as emoji.

Every text that holds something of the user's, such as the name of a layer or a prompt, goes through here.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def say(console: Console, text: str, style: str = "") -> None:
    """Print a text in one style."""
    console.print(Text(text, style=style))


class PlainTable(Table):
    """A rich table whose title, headers and cells are shown as they are."""

    def __init__(self, *headers: Any, title: Any = None, **options: Any) -> None:
        super().__init__(*headers, **options)
        self.title = Text(title, style=self.title_style or "table.title") if isinstance(title, str) else title

    def add_column(self, header: Any = "", *arguments: Any, **options: Any) -> None:
        super().add_column(_plain(header), *arguments, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_plain, cells), **options)


def _plain(cell: Any) -> Any:
    return Text(cell) if isinstance(cell, str) else cell
