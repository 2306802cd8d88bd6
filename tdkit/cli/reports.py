"""The report that a command leaves in the folder it has written."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from tdkit.cli.output import note
from tdkit.errors import TdkitError
from tdkit.records.record import RECORD, Record
from tdkit.reporting.report import write_report


def leave_report(folder: Path) -> None:
    """Write the page and its numbers into a folder; says why where that is not possible."""
    try:
        page = write_report([folder], figures=False)
    except TdkitError as error:
        note(f"no report was written: {error}")
        return
    except Exception as error:  # whatever it is, the work that is reported is done and saved
        note(f"no report was written: {type(error).__name__}: {error} (tdkit --debug report {folder} tells more)")
        return
    note(f"report: {page}")


def leave_record(record: Record, folder: Path, *, report: bool) -> None:
    """Write the record of a model into its folder, and the report of it."""
    record.save(folder / RECORD)
    if report:
        leave_report(folder)


def command_line() -> str:
    """Returns the command line of this process, to be recorded."""
    return shlex.join(["tdkit", *sys.argv[1:]])
