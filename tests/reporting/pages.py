"""What a page is made of, read with the parser of the standard library."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use", "rect"}


@dataclass
class Figure:
    labels: list[str] = field(default_factory=list)
    marks: int = 0
    rows: int = 0
    caption: str = ""


class Page(HTMLParser):
    """The figures, identifiers, addresses and texts of a page; a tag that is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[Figure] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._begin(tag, dict(attrs))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._begin(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("h1", "h2", "h3", "h4"):
            self.headings.append(data.strip())
        if self._open and self._open[-1] == "figcaption":
            self.figures[-1].caption += data

    def _begin(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tags.add(tag)
        self.ids += [value for key, value in attributes.items() if key == "id" and value]
        self.addresses += [value for key, value in attributes.items() if key in ("href", "src", "xlink:href") and value]
        if tag == "figure":
            self.figures.append(Figure())
        if "figure" in self._open:
            if tag == "svg":
                self.figures[-1].labels = (attributes.get("aria-labelledby") or "").split()
            self.figures[-1].marks += tag in ("path", "use") and "svg" in self._open
            self.figures[-1].rows += tag == "tr"
