"""Formulas as MathML, which browsers draw without a script and screen readers read; CONTRIBUTING.md and notebooks as
pages.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from notebooks import markdown  # beside this file, where mkdocs looks while it loads a hook

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


DOWNLOAD = "[Download this notebook]({name}){{ .md-button }}\n\n"


def on_files(files: Files, config: Any, **_: object) -> Files:
    """Add a page for each notebook, which stays beside it to be downloaded."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = Path(notebook.abs_src_path or "")
        heading, _, rest = markdown(path, outputs=True).partition("\n\n")
        text = f"{heading}\n\n{DOWNLOAD.format(name=path.name)}{rest}"
        files.append(File.generated(config, notebook.src_uri.removesuffix(".ipynb") + ".md", content=text))
    return files


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
