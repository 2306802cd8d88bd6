"""A small drawing: boxes, words and arrows as SVG that is legible on light and dark pages and on paper.

The colours are those of Okabe and Ito (2008), which colour-blind readers tell apart. No meaning is in colour alone:
every box has its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from xml.sax.saxutils import escape

WIDTH = 360  # pixels: the width of a page on a phone, so that words keep their size there
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1a1a1a; text-anchor: middle }
.small { font-size: 11.5px }
.left { text-anchor: start }
.right { text-anchor: end }
.bold { font-weight: 600 }
.line { stroke: #555; stroke-width: 1.3; fill: none }
.thin { stroke: #999; stroke-width: 0.8; fill: none }
.tip { fill: #555 }
.blue { fill: #cfe3f1; stroke: #0072b2 }
.orange { fill: #fbe6c0; stroke: #b87f00 }
.green { fill: #c8e8dd; stroke: #008060 }
.red { fill: #f6d5c4; stroke: #c65000 }
.grey { fill: #e6e6e6; stroke: #777 }
.none { fill: none; stroke: #777; stroke-dasharray: 4 3 }
.ink { fill: none; stroke-width: 2.2 }
@media (prefers-color-scheme: dark) {
  text { fill: #eee }
  .line { stroke: #aaa } .thin { stroke: #777 } .tip { fill: #aaa }
  .blue { fill: #123c57; stroke: #56b4e9 }
  .orange { fill: #54400f; stroke: #e69f00 }
  .green { fill: #0d4a3a; stroke: #2fc69b }
  .red { fill: #5a2a10; stroke: #ee8a4c }
  .grey { fill: #3c3f46; stroke: #a0a0a0 }
  .none { stroke: #a0a0a0 }
}
.ink { fill: none }
"""


class Drawing:
    """Draws from the top left corner; sizes are in pixels."""

    def __init__(self, title: str, height: float) -> None:
        self.title, self.height = title, height
        self._parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: str,
        text: str = "",
        *,
        small: bool = False,
        below: Mapping[float, str] = MappingProxyType({}),
    ) -> None:
        """A box with words in its middle, and small ones below it, by their height in the drawing."""
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" class="{colour}"/>')
        if text:
            self.text(x + width / 2, y + height / 2, text, "small" if small else "")
        for at, label in below.items():
            self.text(x + width / 2, at, label, "small")

    def grid(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        rows: int,
        columns: int,
        colour: str,
        *,
        below: Mapping[float, str] = MappingProxyType({}),
    ) -> None:
        """A box of cells."""
        self.box(x, y, width, height, colour, below=below)
        for row in range(1, rows):
            self.path(f"M{x:g} {y + height * row / rows:g}h{width:g}", "thin")
        for column in range(1, columns):
            self.path(f"M{x + width * column / columns:g} {y:g}v{height:g}", "thin")

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        """Words centred on a point; a line for each line of the text."""
        lines = text.split("\n")
        for number, line in enumerate(lines):
            at = y + 4.5 + 15 * (number - (len(lines) - 1) / 2)
            self._parts.append(f'<text x="{x:g}" y="{at:g}" class="{style}">{escape(line)}</text>')

    def path(self, data: str, style: str = "line") -> None:
        """A path of SVG."""
        self._parts.append(f'<path d="{data}" class="{style}"/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A straight arrow."""
        length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
        along = ((to_x - x) / length, (to_y - y) / length)
        base = (to_x - 7 * along[0], to_y - 7 * along[1])
        side = (-3.5 * along[1], 3.5 * along[0])
        self.path(f"M{x:g} {y:g}L{base[0]:g} {base[1]:g}")
        corners = [(to_x, to_y), (base[0] + side[0], base[1] + side[1]), (base[0] - side[0], base[1] - side[1])]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        self._parts.append(f'<polygon points="{points}" class="tip"/>')

    def svg(self) -> str:
        """The file."""
        body = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height:g}" '
            f'viewBox="0 0 {WIDTH} {self.height:g}" role="img">\n<title>{escape(self.title)}</title>\n'
            f"<style>{STYLE}</style>\n{body}\n</svg>\n"
        )
