"""The Python blocks of the documentation run; the names, files and packages that it lists exist."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.benchmarks import layers
from tests.side_packages import INSTALL, SIDE, use_torchao

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(page: Path) -> None:
    """The blocks of one page in order, in one namespace, as a reader would type them."""
    import __main__

    use_torchao()
    namespace: dict[str, object] = {"__name__": __main__.__name__}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


def of_torchvision(page: Path) -> bool:
    return any("torchvision" in block for block in blocks(page))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p) and not of_torchvision(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.skipif(not SIDE.is_dir(), reason=f"torchvision is not there: {INSTALL}")
@pytest.mark.parametrize("page", [p for p in PAGES if of_torchvision(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_code_of_a_page_with_torchvision_runs(page: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.side_packages import use_side_packages
use_side_packages()
from tests.test_docs import run
run(Path({str(page)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_table_of_layers_is_that_of_the_code() -> None:
    text = layers.PAGE.read_text(encoding="utf-8")
    assert layers.page(text) == text


@pytest.mark.real
def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert blocks(ROOT / "README.md")
    run(ROOT / "README.md")


def test_contributors_find_every_package_and_module() -> None:
    rows = re.findall(r"^\| `(\w+)(?:\.py)?` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = {
        path.stem for path in (ROOT / "tdkit").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert sorted(rows) == sorted(found - {"__init__"})


NAMED = re.compile(r"`(tdkit(?:\.\w+)+)`|^::: (tdkit(?:\.\w+)+)$", re.MULTILINE)
GROUPS = ("allocators", "hosts", "losses", "steps", "texts")  # of entry points, besides those named like a package
NO_OBJECTS = {"tdkit.json", *(f"tdkit.{group}" for group in GROUPS)}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_what_a_page_names_exists(page: Path) -> None:
    for name in {"".join(names) for names in NAMED.findall(page.read_text(encoding="utf-8"))} - NO_OBJECTS:
        pkgutil.resolve_name(name)


def test_every_page_is_in_the_navigation_and_every_entry_exists() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = yaml.safe_load(text)["nav"]

    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for value in (entry.values() if isinstance(entry, dict) else entry) for name in files(value)]

    assert sorted(files(navigation)) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES)
