"""Tables as rich tables, plain text or Markdown.

rich is imported when a table is created, because its import is slow and draws from Python's global random state.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def render(table: RenderableType, width: int = 160) -> str:
    """Returns a rich table, or a group of them, as plain text, without trailing blanks.

    Args:
        width: the maximum width in characters.
    """
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def table_of(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> Table:
    """Returns a rich table, the first column left and the others right aligned, without interpreted markup."""
    from tdkit.support.plain import PlainTable

    table = PlainTable(title=title or None, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
