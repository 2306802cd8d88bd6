"""Tables and messages show what the user wrote, square brackets included."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tdkit.support.plain import say
from tdkit.support.progress import progress_bar
from tdkit.support.tables import render, table_of

TEXTS = ["[INST] Hi [/INST]", "re:[a-z]+", "[/]", "[bold]x", "a\\[b]", ":smile:", "[link=x]y[/link]", "end\\"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_table_shows_its_texts_as_they_are(text: str) -> None:
    table = table_of(f"title {text}", [f"header {text}", "b"], [[f"cell {text}", text]])
    table.add_row(f"added {text}", text, style="dim")
    lines = render(table).splitlines()
    assert lines[0] == f"title {text}"
    assert f"header {text}" in lines[2]
    for line, first in ((lines[4], f"cell {text}"), (lines[5], f"added {text}")):
        assert [cell.strip() for cell in line.strip("│").split("│")] == [first, text]


def test_a_title_keeps_its_style() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(table_of("title", ["a"]))
    assert console.file.getvalue().startswith("\x1b[1mtitle")


@pytest.mark.parametrize("text", TEXTS)
def test_a_message_is_printed_as_it_is(text: str) -> None:
    console = Console(file=io.StringIO())
    say(console, text, "bold")
    assert console.file.getvalue() == f"{text}\n"


def test_a_label_of_a_bar_is_shown_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws bars on terminals only
    with progress_bar("[b] {fit}", 2, show=True) as bar:
        bar.now("re:[a-z]+ [/INST]")
        bar.advance()
    shown = capsys.readouterr().err
    assert "[b] {fit}" in shown
    assert "re:[a-z]+ [/INST]" in shown
