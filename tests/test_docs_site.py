"""The built documentation: no warning, found by its search, drawings up to date, no page wider than a phone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.drawings import DRAWINGS
from docs.drawings.svg import WIDTH
from tests.documentation import DOCS, PAGES, ROOT
from tests.reporting.browser import NAMES

PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation, without a network; skips the test where mkdocs is not installed."""
    mkdocs = shutil.which("mkdocs", path=PLACES)
    if mkdocs is None:
        pytest.skip("mkdocs is not there: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("documentation")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "plugins" / "tdkit-distill"), os.environ.get("PYTHONPATH", "")])
    call = [mkdocs, "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_nothing_but_the_site_is_published(site: Path) -> None:
    assert not list(site.rglob("*.py"))
    assert (site / "images" / "low-rank.svg").is_file()


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("Kronecker", "decompositions/kronecker/"),
        ("out of memory", "troubleshooting/"),
        ("tied", "troubleshooting/"),
        ("BudgetError", "troubleshooting/"),
        ("LSTM", "how-to/recurrent/"),
        ("perplexity", "evaluation/"),
    ],
)
def test_search_finds(site: Path, words: str, where: str) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    texts = {entry["location"]: f"{entry['title']} {entry['text']}".lower() for entry in entries}
    assert where in {location.partition("#")[0] for location, text in texts.items() if words.lower() in text}


def test_formulas_are_typeset(site: Path) -> None:
    page = (site / "decompositions" / "low_rank" / "index.html").read_text(encoding="utf-8")
    assert page.count("<math") >= 5
    for built in site.rglob("*.html"):
        assert "\\(" not in built.read_text(encoding="utf-8"), built


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_are_up_to_date_and_shown(name: str) -> None:
    """``python -m docs.drawings`` writes them."""
    assert (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8") == DRAWINGS[name].svg()
    shown = re.compile(rf"!\[[^\]]{{20,}}\]\((\.\./)*images/{name}\.svg\)")
    assert any(shown.search(page.read_text(encoding="utf-8")) for page in PAGES), "no page shows it, with a description"


# Run at the end of each page, which then reports to the page that holds it.
LOOK = """
<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll(".md-content *")].filter(each =>
    !each.closest("pre, math, .md-typeset__scrollwrap, .highlight, .doc-signature") &&
    each.getBoundingClientRect().right > innerWidth + 1);
  const broken = [...document.images].filter(each => !each.naturalWidth);
  parent.postMessage({
    width: innerWidth, page: document.documentElement.scrollWidth,
    wide: wide.map(each => each.tagName + " " + each.textContent.slice(0, 60)), broken: broken.map(each => each.src),
  }, "*");
});
</script>
"""
# A window is never narrower than 500 pixels, so each page is shown in a frame, one after the other.
FRAME = """<!DOCTYPE html><title>nothing</title>
<script>
const pages = %s, found = {};
let at = -1;
addEventListener("message", event => { if (at >= 0) found[pages[at]] = event.data; next(); });
function next() {
  if (++at == pages.length) document.title = "LOOK" + JSON.stringify(found);
  else document.querySelector("iframe").src = pages[at];
}
addEventListener("load", next);
</script>
<iframe width="%d" height="800" style="border: 0"></iframe>
"""


FEW = ("decompositions/kronecker", "concepts", "troubleshooting", "results/accuracy", "how-to/resume")


@pytest.mark.parametrize("names", [FEW, pytest.param(None, marks=pytest.mark.slow)], ids=["few", "all"])
def test_no_page_is_wider_than_a_phone(site: Path, names: tuple[str, ...] | None) -> None:
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium or chrome is installed")
    built = (
        sorted(site.rglob("index.html")) if names is None else [site / name / "index.html" for name in sorted(names)]
    )
    pages = [str(path.relative_to(site)) for path in built]
    for path in built:
        text = path.read_text(encoding="utf-8").replace(LOOK, "")
        path.write_text(text.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    frame = site / "frame.html"
    frame.write_text(FRAME % (json.dumps(pages), WIDTH + 30), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=200000", "--dump-dom"]
    call = [program, *options, f"--user-data-dir={site / 'profile'}", frame.as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r"<title>LOOK(.*?)</title>", done.stdout, re.DOTALL)
    assert found, done.stderr
    seen = json.loads(html.unescape(found[1]))
    assert sorted(seen) == pages
    assert {page: look for page, look in seen.items() if look["page"] > look["width"] or look["wide"]} == {}
    assert {page: look["broken"] for page, look in seen.items() if look["broken"]} == {}
