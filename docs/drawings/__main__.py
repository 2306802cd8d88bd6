from pathlib import Path

from docs.drawings import DRAWINGS

folder = Path(__file__).parents[1] / "images"
for name, drawing in DRAWINGS.items():
    (folder / f"{name}.svg").write_text(drawing.svg(), encoding="utf-8")
