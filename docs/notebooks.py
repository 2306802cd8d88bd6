"""The notebooks of the documentation: read as Markdown, and run without a notebook server.

``python -m docs.notebooks docs/tutorials/NAME.ipynb`` runs the cells of a notebook in an empty folder and stores what
they print and the picture that they end in; ``tests/test_docs.py`` runs them at toy size and stores nothing.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import chdir, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

SVG = "image/svg+xml"


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells of a notebook, as they are stored."""
    found: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return found


def markdown(notebook: Path, *, outputs: bool = False) -> str:
    """A notebook as a page: its text, its code in fenced blocks and, if asked for, what was stored below the code."""
    parts = []
    for cell in cells(notebook):
        source = "".join(cell["source"]).strip("\n")
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts += [_shown(output) for output in cell["outputs"] if outputs]
    return "\n\n".join(parts) + "\n"


def _shown(output: Mapping[str, Any]) -> str:
    """A stored output as Markdown."""
    if "text" in output:
        return f'```{{.text .output title="Output"}}\n{"".join(output["text"]).rstrip()}\n```'
    drawing = "".join(output["data"][SVG])
    return f'<div class="picture">{drawing[drawing.index("<svg") :].strip()}</div>'


def session() -> dict[str, object]:
    """The variables of a session that begins: those of a module that can be imported, as torch.compile needs."""
    module = ModuleType("session")
    sys.modules[module.__name__] = module
    return vars(module)


def run_cell(source: str, name: str, namespace: dict[str, object]) -> list[dict[str, Any]]:
    """Run the code of a cell, and return its outputs as a notebook stores them.

    Args:
        name: of the notebook, for tracebacks.
        namespace: the variables, which the cell changes.
    """
    *body, last = ast.parse(source, name).body
    ends_in = last.value if isinstance(last, ast.Expr) else None
    statements = ast.Module(body if ends_in else [*body, last], [])
    value, said = None, io.StringIO()
    with redirect_stdout(said):
        exec(compile(statements, name, "exec", dont_inherit=True), namespace)
        if ends_in:
            value = eval(compile(ast.Expression(ends_in), name, "eval", dont_inherit=True), namespace)
    made: list[dict[str, Any]] = []
    if said.getvalue():
        made.append({"name": "stdout", "output_type": "stream", "text": said.getvalue().splitlines(keepends=True)})
    if hasattr(value, "_repr_svg_"):
        lines = value._repr_svg_().splitlines(keepends=True)
        made.append({"data": {SVG: lines}, "metadata": {}, "output_type": "display_data"})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    path: Path = parser.parse_args().notebook.resolve()
    notebook = json.loads(path.read_text(encoding="utf-8"))
    namespace = session()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for number, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
            cell["execution_count"] = number + 1
            cell["outputs"] = run_cell("".join(cell["source"]), path.name, namespace)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
