"""``tdkit report``, and the reports that other commands leave."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tdkit.cli.output import AsJson, note, show
from tdkit.errors import TdkitError
from tdkit.records.tree import render_tree
from tdkit.reporting.gather import gather
from tdkit.reporting.report import Report, check_installed, write_report

NoReport = Annotated[bool, typer.Option("--no-report", help="Leave no report.html in the folder.")]
Within = Annotated[
    float | None,
    typer.Option(
        help="Recommend the smallest model whose metric is within this share of the dense model's; 0.05 by default.",
        min=0,
    ),
]


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
    """Write what was done to models, and what it costs, as a page, JSON, and figures as PNG and SVG.

    [bold]tdkit report runs/smollm2-demo[/bold]
    """
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


def leave_report(folder: Path) -> None:
    """Write the page and its numbers into a folder that a command has written; says why where that is not possible."""
    try:
        page = write_report([folder], figures=False)
    except TdkitError as error:
        note(f"no report was written: {error}")
        return
    except Exception as error:  # whatever it is, the work that is reported is done and saved
        note(f"no report was written: {type(error).__name__}: {error} (tdkit --debug report {folder} tells more)")
        return
    note(f"report: {page} (figures as PNG and SVG: tdkit report {shlex.quote(str(folder))})")


def command_line() -> str:
    """Returns the command line of this process, to be recorded."""
    return shlex.join(["tdkit", *sys.argv[1:]])


COMMANDS = (report,)
