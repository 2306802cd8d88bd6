"""``python -m tests.hostile.report``: run the harness and write ``docs/results/reliability.md``.

Each finished part is stored in ``reliability.json`` beside it, so that parts can be run one by one.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tdkit.support.files import write_text
from tdkit.support.version import VERSION
from tests.hostile import parts

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "docs" / "results"

SEEDED = {  # the shares that the tests run
    "files": 0.02,
    "kills": 0.08,
    "faults": 0.04,
    "exceptions": 0.05,
    "numbers": 0.08,
    "plugins": 1.0,
    "memory": 0.06,
}

HEAD = """\
# Reliability

What was tried against tdkit, and what came of it: `make test-hostile` (`python -m tests.hostile.report`), tdkit
{version}, torch {torch}, Python {python}. Every outcome must be success or a
`tdkit.errors.TdkitError`, and nothing may be lost, changed half way or left over; "bad" counts the others. "share"
says how much of a part was run: the kills before every change, or before every second one.

| part | share | tried | bad | seconds | commit |
| --- | --- | --- | --- | --- | --- |
{rows}
"""

FOUND = """
## Found and mended

Each has a test that failed before.

- Hosts: 26 of 45 kinds of misbehaviour came through as raw exceptions of the host, or were not named.
- A sweep on a full disk, or killed before its description was written, could not go on; a description, or figures of
  the dense model, of another type were raw errors; overwriting a sweep removed files of others in its folder.
- Records with values of other types, or of modules at impossible depths, made a report fail much later.
- Windows of a text packed on a full disk were cut without a word, and changed token ids were trained on.
- A damaged choice of precision was a raw error of healing.
- Of two processes that compress one folder, the one that was overtaken could fail though the folder was complete.
- In the harness: runs and checkpoints were read to their end before they were mutated, so that little was left to find.
"""

TITLES = {
    "files": (
        "Mutated files",
        """Every kind of file that tdkit reads, changed by a seed: places of JSON and YAML deleted, replaced, swapped,
repeated; headers and numbers of safetensors; files cut, garbled, emptied or taken away; digests stale or made to match.
Each is read and used within 2 seconds of processor time and 500 MB.""",
    ),
    "kills": (
        "kill -9",
        """A process is killed before a change that it makes to the file system (rename, exchange, fsync, mkdir, unlink,
rmdir, open for writing). What was there or what was to come is whole; the same call again ends with the result of an
undisturbed one, and nothing is left over.""",
    ),
    "faults": (
        "Full and read-only disks, two at once",
        """Every change from some one on fails, files cannot grow beyond a size, or two processes do the same at once;
then as above.""",
    ),
    "exceptions": (
        "Exceptions and Ctrl-C",
        """An exception is raised at one call of a function of tdkit. The model is bit-identical to what it was, or,
where the exception comes after the last change, finished.""",
    ),
    "numbers": (
        "Degenerate weights",
        """13 weights (zeros, rank one, 1e-42, NaN, ...) in 4 dtypes and 7 metrics, of whose combinations one in five:
finite factors, or an error with the model unchanged.""",
    ),
    "plugins": (
        "Plugins and hosts",
        """Each misbehaves in one way; it is named, in an error or a warning, and breaks only itself.""",
    ),
    "memory": (
        "Memory and threads",
        """50 compressions, and a distillation of 2,000 steps, each in one process that may grow by 20 MB at most; and
the same work twice on 1 and on 2 threads.""",
    ),
}


def main() -> None:
    """Run the parts that the command line names, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *parts.PARTS], default=[])
    parser.add_argument("--share", type=float, default=1.0, help="of the full size")
    parser.add_argument("--seeded", action="store_true", help="the shares that the tests run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PLACE)
    options = parser.parse_args()
    stored = options.out / "reliability.json"
    known: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    bad = 0
    for name in options.parts or parts.PARTS:
        share = SEEDED[name] if options.seeded else options.share
        part = parts.run(name, share, options.seed)
        print(f"{name}: {part.tried} tried, {len(part.bad)} bad, {part.seconds:.0f} s", flush=True)
        for text in part.bad:
            print(f"  {text}", flush=True)
        bad += len(part.bad)
        known[name] = {
            "rows": {what: dict(row) for what, row in part.rows.items()},
            "bad": [_without_places(text) for text in part.bad],
            "figures": part.figures,
            "seconds": part.seconds,
            "share": share,
            "commit": commit(),
        }
        write_text(stored, json.dumps(known, indent=1) + "\n")
        write_text(options.out / "reliability.md", page(known))
    raise SystemExit(1 if bad else 0)


def _without_places(text: str) -> str:
    """Returns a traceback without the folders of this machine."""
    for place in (sys.prefix, str(ROOT)):
        text = text.replace(f"{place}/", "")
    return text


def commit() -> str:
    """Returns the commit of the code, and whether it differs from it."""

    def git(*given: str) -> str:
        return subprocess.run(["git", *given], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = " and changes" if git("status", "--porcelain", "--", "tdkit", "plugins", "tests") else ""
    return f"{git('rev-parse', '--short=10', 'HEAD') or 'unknown'}{changed}"


def page(known: dict[str, Any]) -> str:
    """Returns the text of the page."""
    names = [name for name in TITLES if name in known]
    rows = "\n".join(_row(TITLES[name][0], known[name]) for name in names)
    text = HEAD.format(version=VERSION, torch=torch.__version__, python=platform.python_version(), rows=rows)
    for name in names:
        part = known[name]
        outcomes = sorted({outcome for row in part["rows"].values() for outcome in row} | {"bad"}, key="bad".__eq__)
        text += f"\n## {TITLES[name][0]}\n\n{TITLES[name][1]}\n\n"
        text += f"| what | {' | '.join(outcomes)} |\n| --- |{' --- |' * len(outcomes)}\n"
        for what, row in part["rows"].items():
            text += f"| {what} | {' | '.join(f'{row.get(outcome, 0):,}' for outcome in outcomes)} |\n"
        if part["figures"]:
            text += "\n" + ", ".join(f"{what} {value:,g}" for what, value in part["figures"].items()) + ".\n"
    return text + FOUND


def _row(title: str, part: dict[str, Any]) -> str:
    cells = (
        title,
        f"{part['share']:.0%}",
        f"{_tried(part):,}",
        len(part["bad"]),
        f"{part['seconds']:,.0f}",
        part["commit"],
    )
    return f"| {' | '.join(map(str, cells))} |"


def _tried(part: dict[str, Any]) -> int:
    return sum(sum(row.values()) for row in part["rows"].values())


if __name__ == "__main__":
    main()
