"""``tdkit report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tdkit.cli.options import Within
from tdkit.cli.output import AsJson, Command, note, show


def report(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Saved models, runs, sweeps or distillations; also files of tdkit eval --out."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder to write; by default 'report' in the first DIR.")
    ] = None,
    within: Within = None,
    tree: Annotated[
        bool, typer.Option("--tree", help="Print the modules before and after instead of writing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write what was done to models, and what it costs, as a page, JSON, and figures as PNG and SVG."""
    from tdkit.records.tree import render_tree
    from tdkit.reporting.gather import gather
    from tdkit.reporting.report import Report, check_installed, write_report

    if tree:
        found = gather(places).entries
        trees = {e.name: {"before": list(e.record.before), "after": list(e.record.after)} for e in found}
        text = [
            f"{name}, {when}:\n{render_tree(branches) or 'not recorded'}"
            for name, both in trees.items()
            for when, branches in both.items()
        ]
        data = {
            name: {when: [branch.to_dict() for branch in branches] for when, branches in both.items()}
            for name, both in trees.items()
        }
        show("\n\n".join(text), data, as_json)
        return
    check_installed()
    made = Report(gather(places), within)
    page = write_report(places, out, within=within)
    note(f"report written to {page}")
    lines = [entry.sentence() for entry in made.entries] + ([made.choice] if made.choice else [])
    show("\n".join(lines), made.to_dict() if as_json else None, as_json)


COMMANDS = (Command(report, "tdkit report smaller runs/demo --out report"),)
