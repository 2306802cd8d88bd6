"""The table of a plan, with the columns that its width has room for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tdkit.models.sites import Untouchable
from tdkit.planning.rows import Row, groups_of, kept_lines, row_of, row_of_kept
from tdkit.planning.step import Step

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

GROUP_ABOVE = 20  # rows above which similar layers of different depth share one
READABLE = 24  # characters that names keep while other texts can be broken


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its key in the rows.
        header: the text above it.
        left: whether it is aligned left.
    """

    name: str
    header: str
    left: bool = False


COLUMNS = (
    Column("layer", "layer", left=True),
    Column("shape", "shape"),
    Column("becomes", "becomes", left=True),
    Column("params", "params"),
    Column("of dense", "of dense"),
    Column("multiply-adds", "multiply-adds / token"),
    Column("path", "path at 1 | 512 tokens"),
    Column("relative error", "relative error"),
    Column("loss", "loss, estimated"),
    Column("runner-up", "runner-up"),
)
WHERE_KNOWN = ("relative error", "loss", "runner-up")  # columns that are left out where they are empty
FIRST_TO_GO = ("path", "multiply-adds", "runner-up", "shape", "relative error")  # from a table that is too wide


@dataclass(frozen=True)
class PlanTable:
    """What becomes of every weight, to print with rich at any width.

    Numbers are rounded, then columns left out, and a line says which, until the table fits; then names are broken at
    their dots and decompositions at their commas.

    Attributes:
        columns: all that there is to show.
        rows: one per weight or group of equal layers.
        kept: a line for every reason why weights that have no row stay dense.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    kept: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.measure import Measurement
        from rich.text import Text

        def width(table: Table) -> int:
            return Measurement.get(console, options.update(max_width=10**6), table).maximum

        columns, gone = list(self.columns), []
        going = [column for name in FIRST_TO_GO for column in columns if column.name == name]
        table = _table(columns, self._texts(columns))
        narrower = iter(("numbers", "headers", *going))
        short = headers = False
        while self.rows and width(table) > options.max_width and (step := next(narrower, None)):
            short, headers = True, headers or step != "numbers"
            if isinstance(step, Column):
                gone.append(step)
                columns.remove(step)
            table = _table(columns, self._texts(columns, short), headers)
        excess = width(table) - options.max_width
        if self.rows and excess > 0:
            table = _table(columns, _broken(self._texts(columns, short), columns, excess), headers)
        if self.rows:
            yield table
        for line in self.kept:
            yield Text(line, style="dim")
        if self.rows and gone:
            names = ", ".join(column.header for column in self.columns if column in gone)
            yield Text(f"not shown at this width: {names}", style="dim")

    def _texts(self, columns: Sequence[Column], short: bool = False) -> list[tuple[list[str], str | None]]:
        chosen = [{**row.cells, **row.short} if short else row.cells for row in self.rows]
        return [
            ([cells.get(column.name, "") for column in columns], row.style)
            for cells, row in zip(chosen, self.rows, strict=True)
        ]


def plan_table(steps: Sequence[Step], untouchable: Sequence[Untouchable], *, every: bool = False) -> PlanTable:
    """Returns a table with layer, shape, replacement, parameters, multiply-adds and paths.

    Relative error, estimated loss and runner-up are added where they are known. Weights that stay dense are summed up
    below it, by reason.

    Args:
        every: one row per weight, however many there are, also for those that stay dense.
    """
    shown = [step for step in steps if every or step.decomposition is not None]
    one_by_one = every or len(shown) <= GROUP_ABOVE
    rows = [row_of(group) for group in ([[step] for step in shown] if one_by_one else groups_of(shown))]
    if every:
        rows += [row_of_kept([weight]) for weight in untouchable]
    columns = [c for c in COLUMNS if c.name not in WHERE_KNOWN or any(row.cells.get(c.name) for row in rows)]
    if any(step.shape[2:] and step.paths for step in steps):  # of a convolution's output
        columns = [
            replace(column, header=re.sub(r"token(s?)$", r"token\1 or position\1", column.header)) for column in columns
        ]
    return PlanTable(tuple(columns), tuple(rows), () if every else tuple(kept_lines(steps, untouchable)))


def _table(columns: Sequence[Column], rows: Sequence[tuple[Sequence[str], str | None]], broken: bool = False) -> Table:
    """Returns the table as one of rich, with `broken` its headers in as many lines as its cells allow."""
    from rich import box

    from tdkit.support.plain import PlainTable

    table = PlainTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        header = column.header
        if broken:
            width = max(len(line) for cells, _ in rows for line in cells[number].split("\n"))
            header = _lines(header, max(width, *map(len, header.split())))
        table.add_column(header, justify="left" if column.left else "right", overflow="fold")
    for cells, style in rows:
        table.add_row(*cells, style=style)
    return table


def _broken(
    rows: list[tuple[list[str], str | None]], columns: Sequence[Column], excess: int
) -> list[tuple[list[str], str | None]]:
    """Break names at their dots and decompositions at their commas, until they are `excess` characters narrower."""
    texts = [number for number, column in enumerate(columns) if column.left]
    least = {n: max(len(part.rstrip()) for cells, _ in rows for part in _parts(cells[n])) for n in texts}
    widths = {n: max(len(cells[n]) for cells, _ in rows) for n in texts}
    for number, floor in [(texts[0], READABLE), *((n, 0) for n in reversed(texts))]:
        narrower = min(excess, max(widths[number] - max(least[number], floor), 0))
        widths[number] -= narrower
        excess -= narrower
    return [
        ([_lines(cell, widths[number]) if number in widths else cell for number, cell in enumerate(cells)], style)
        for cells, style in rows
    ]


def _parts(text: str) -> list[str]:
    """Returns the parts that a text is broken into: after single dots, commas, opening brackets and blanks."""
    return re.findall(r".+?(?:(?<!\.)\.(?!\.)|[ ,(](?!x\d)|$) *", text)


def _lines(text: str, width: int) -> str:
    """Break a text into lines of at most `width` characters where it can be."""
    lines = [""]
    for part in _parts(text):
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
