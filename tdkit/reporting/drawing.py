"""A figure, drawn once by matplotlib: SVG that follows the colours of a page, files of SVG and PNG, and a table.

matplotlib is imported when a figure is drawn; its global state is not touched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, PAPER = "#1c1d22", "#c9cbd3", "#ffffff"
# Okabe and Ito (2008), "Color universal design", without yellow; neighbours stay apart in grey print as well.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6b6e78")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 4.8  # inches; a phone shows it at three quarters of its size
RC: dict[Any, Any] = {
    "font.size": 9.0,
    "font.family": "sans-serif",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Drawing:
    """A figure and the table with the same numbers.

    Attributes:
        name: a file name without an ending, unique in the report.
        title: what it shows.
        text: what a reader is to see in it, for those who see no picture too.
        columns: of the table.
        rows: of the table; never empty.
        height: in inches.
        draw: draws on an empty figure.
    """

    name: str
    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    height: float
    draw: Callable[[Figure], None]

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON-able values."""
        return {"title": self.title, "text": self.text, "columns": list(self.columns), "rows": [*map(list, self.rows)]}

    def svg(self) -> str:
        """Returns the figure as an SVG file of fixed colours on white."""
        return self._saved("svg").decode()

    def png(self) -> bytes:
        """Returns the figure as a PNG file at 200 dots per inch."""
        return self._saved("png")

    def inline(self) -> str:
        """Returns the figure as an element for a page: the colours are the page's variables, the size follows it."""
        text = self.svg()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(?:xlink:)?href="#', f'href="#{self.name}-', text)
        text = text.replace("url(#", f"url(#{self.name}-")
        for colour, variable in [(INK, "--ink"), (FAINT, "--faint"), (PAPER, "--paper")] + [
            (colour, f"--series-{number}") for number, colour in enumerate(SERIES)
        ]:
            text = re.sub(re.escape(colour), f"var({variable})", text, flags=re.IGNORECASE)
        box = re.search(r'viewBox="[^"]*"', text)
        head = f'<svg {box[0] if box else ""} role="img" aria-labelledby="{self.name}-title {self.name}-text">'
        return re.sub(r"<svg[^>]*>", head, text, count=1)

    def _saved(self, form: str) -> bytes:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        with mpl.rc_context({**RC, "svg.hashsalt": self.name}):
            figure = Figure(figsize=(WIDTH, self.height), facecolor=PAPER)
            self.draw(figure)
            target = io.BytesIO()
            figure.savefig(
                target, format=form, dpi=200, metadata={"Date": None} if form == "svg" else {"Software": None}
            )
        return target.getvalue()


def colour(number: int) -> str:
    """Returns the colour of a series."""
    return SERIES[number % len(SERIES)]


def marker(number: int) -> str:
    """Returns the marker of a series, so that series differ without colours."""
    return MARKERS[number % len(MARKERS)]
