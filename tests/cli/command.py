"""Run the command in this process, as the console script does."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from tdkit.cli.app import main
from tdkit.cli.output import BARS


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """Exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["tdkit", *map(str, arguments)])
    for name in BARS:
        monkeypatch.setenv(name, "1")  # as the command does, but only until the test ends
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)
