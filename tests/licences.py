"""``python -m tests.licences``: write ``docs/licences.md``, the licences of what tdkit needs, as installed here.

With ``--pins`` it prints these packages with their versions instead, for ``make audit``.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement

from tdkit.support.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "licences.md"

HEAD = """\
# Licences

The licences of the packages that `pip install tdkit` needs, directly or through others, as their metadata state them
(`python -m tests.licences`). tdkit itself is under Apache-2.0. Packages of NVIDIA, which torch's CUDA builds need on
Linux, are not listed: they are under NVIDIA's own terms.

| package | licence |
| --- | --- |
"""


def needed(name: str, seen: dict[str, str]) -> dict[str, str]:
    """Returns the licences by package, of `name` and of what it needs without extras on this machine."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in seen or key.startswith("nvidia"):
        return seen
    try:
        found = distribution(name)
    except PackageNotFoundError:  # for another system
        return seen
    seen[key] = licence_of(found.metadata)
    for text in found.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, seen)
    return seen


def licence_of(metadata: object) -> str:
    """Returns the licence that the metadata of a package state."""
    fields: dict[str, list[str]] = {}
    for key, value in metadata.items():  # type: ignore[attr-defined]
        fields.setdefault(key, []).append(value)
    if "License-Expression" in fields:
        return fields["License-Expression"][0]
    named = [line.rpartition("::")[2].strip() for line in fields.get("Classifier", ()) if line.startswith("License ::")]
    text = fields.get("License", [""])[0].strip()
    short = text if 0 < len(text) < 60 and "\n" not in text else ""
    return " and ".join(named) or short or "see its LICENSE"


def main() -> None:
    """Write the page, or print the versions."""
    rows = [(name, licence) for name, licence in sorted(needed("tdkit", {}).items()) if name != "tdkit"]
    if "--pins" in sys.argv[1:]:
        print("\n".join(f"{name}=={version(name).partition('+')[0]}" for name, _ in rows))
        return
    write_text(PAGE, HEAD + "".join(f"| {name} | {licence} |\n" for name, licence in rows))


if __name__ == "__main__":
    main()
