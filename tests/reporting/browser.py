"""Open a page in a headless browser, where there is one, and look at what it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

# Run at the end of the page: every part is opened, then measured.
LOOK = """
<script>
for (const each of document.querySelectorAll("details")) each.open = true;
const wide = [], cut = [];
for (const each of document.querySelectorAll("body *")) {
  if (each.closest(".scroll, pre, svg, .skip")) continue;
  if (each.getBoundingClientRect().right > innerWidth + 1)
    wide.push(each.tagName + " " + each.textContent.slice(0, 40));
}
for (const svg of document.querySelectorAll("svg")) {
  const box = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll("text")) {
    const own = text.getBoundingClientRect();
    if (own.left < box.left - 2 || own.right > box.right + 2 || own.bottom > box.bottom + 2 || own.top < box.top - 2)
      cut.push(text.textContent);
  }
}
const style = getComputedStyle(document.body);
parent.postMessage(JSON.stringify({
  width: innerWidth, page: document.documentElement.scrollWidth, wide, cut,
  charts: [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    return {width: box.width, height: box.height, marks: svg.querySelectorAll("path, use").length};
  }),
  ink: style.color, back: style.backgroundColor,
}), "*");
</script>
"""
# A window is never narrower than 500 pixels, so the page is shown in a frame.
FRAME = """<!DOCTYPE html><title>nothing</title>
<script>addEventListener("message", event => { document.title = "LOOK" + event.data; });</script>
<iframe src="%s" width="%d" height="900" style="border: 0"></iframe>
"""


@dataclass(frozen=True)
class Seen:
    """What a browser shows of a page.

    Attributes:
        form: sizes in pixels, what is wider than the window, texts cut off in charts, and colours.
        complaints: the messages of the console.
    """

    form: dict[str, Any]
    complaints: list[str]


def look(page: Path, folder: Path, width: int, *, dark: bool = False) -> Seen:
    """Open a page in a window of `width` pixels; skips the test where there is no browser."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium or chrome is installed")
    copy = folder / f"look-{width}-{dark}.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    frame = folder / f"frame-{width}-{dark}.html"
    frame.write_text(FRAME % (copy.name, width), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += ["--window-size=1400,900", "--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}"]
    options.append(f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    done = subprocess.run(
        [program, *options, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"<title>LOOK(.*?)</title>", done.stdout, re.DOTALL)
    assert found, done.stderr
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return Seen(json.loads(text), complaints)
