"""Photograph a report for the documentation, in a headless chromium.

python tests/benchmarks/report_pictures.py sweeps/smollm2/report/report.html --out docs/images
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PICTURES = {  # name: width and height of the window, what is scrolled to, whether it is dark
    "report-desktop": (1280, 1250, "main", False),
    "report-layers": (1280, 1150, "model-1", False),
    "report-phone": (390, 1250, "frontier", True),
}
# Everything is opened and shown in a frame, since a window is never narrower than 500 pixels.
PAGE = """<!DOCTYPE html><style>body {{ margin: 0; }}</style>
<iframe src="{page}" width="{width}" height="{height}" style="border: 0; display: block"></iframe>
"""
OPEN = """<script>
for (const each of document.querySelectorAll("section details"))
  if (each.querySelector(":scope > .pictures")) each.open = true;
const place = document.getElementById("{place}");
if ("{place}" != "main") document.documentElement.scrollTop = place.getBoundingClientRect().top - 16;
</script>"""


def photograph(page: Path, out: Path) -> None:
    """Write the pictures of a page to a folder."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        raise SystemExit(f"none of {', '.join(NAMES)} is installed")
    out.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        for name, (width, height, place, dark) in PICTURES.items():
            copy, frame = Path(scratch, f"{name}.html"), Path(scratch, f"{name}-frame.html")
            copy.write_text(text.replace("</body>", OPEN.format(place=place) + "</body>"), encoding="utf-8")
            frame.write_text(PAGE.format(page=copy.name, width=width, height=height), encoding="utf-8")
            command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command += [f"--window-size={max(width, 500)},{height}", "--virtual-time-budget=3000"]
            command += [
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--user-data-dir={scratch}/profile",
            ]
            picture = Path(scratch, f"{name}.png")
            subprocess.run(
                [*command, f"--screenshot={picture}", frame.as_uri()], check=True, capture_output=True, timeout=120
            )
            _crop(picture, width, out / f"{name}.png")
            print(out / f"{name}.png")


def _crop(picture: Path, width: int, target: Path) -> None:
    """Cut a picture to the width of the frame, and to few colours, which a page of text and charts needs."""
    from PIL import Image

    with Image.open(picture) as image:
        image.crop((0, 0, width, image.height)).convert("RGB").quantize(256).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    photograph(arguments.page, arguments.out)


if __name__ == "__main__":
    main()
