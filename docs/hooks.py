"""Formulas as MathML, which browsers draw without a script and screen readers read; and CONTRIBUTING.md as a page."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Put CONTRIBUTING.md, which lies outside of the documentation, in the place of the page of that name."""
    if page.file.src_uri != "contributing.md":
        return markdown
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](")


def on_page_content(html_: str, page: Any, **_: object) -> str:
    """Put MathML in the place of the formulas that pymdownx.arithmatex found."""

    def mathml(found: re.Match[str]) -> str:
        tex = html.unescape(found[3]).strip()
        written: str = convert(tex, display="inline" if found[2] == "(" else "block")
        if "\\" in written:
            raise PluginError(f"{page.file.src_uri}: latex2mathml does not know all of {tex}")
        return f'<{found[1]} class="formula">{written}</{found[1]}>'

    return FORMULA.sub(mathml, html_)
