"""Progress says what is done, what came of it, and how long it still takes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tdkit.support import progress
from tdkit.support.progress import Bar, clock, progress_bar, show_progress


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    show_progress("bar")


class Clock:
    """A time that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_the_time_left_is_by_work_where_it_is_known(time: Clock) -> None:
    bar = Bar("fit", 4, work=100)
    assert bar.left() is None
    time.now += 30
    bar.advance(work=75)
    assert bar.done() == "1/4"
    assert bar.left() == pytest.approx(10)
    assert bar.times() == "0:30, 0:10 left"
    by_items = Bar("score", 4)
    time.now += 30
    by_items.advance(work=75)
    assert by_items.left() == pytest.approx(90)


def test_what_was_done_before_does_not_count_for_the_time_left(time: Clock) -> None:
    bar = Bar("fit", 4, work=100)
    bar.before(2, 50)
    assert (bar.done(), bar.left()) == ("2/4", None)
    time.now += 10
    bar.advance(work=25)
    assert bar.left() == pytest.approx(10)


def test_without_a_total_the_items_are_counted(time: Clock) -> None:
    bar = Bar("score", None)
    time.now += 61
    bar.advance(3)
    assert (bar.done(), bar.share(), bar.left(), bar.times()) == ("3", None, None, "1:01")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.7, "1:00"), (3600, "1:00:00"), (7325, "2:02:05")])
def test_times(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_lines_come_now_and_then_and_at_the_end(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    show_progress("lines")
    with progress_bar("fit", 5) as bar:
        for number in range(5):
            bar.now(f"layer {number}")
            time.now += 6
            bar.so_far(f"{number + 1} done")
            bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "fit 2/5, 0:12, 0:18 left, 2 done, layer 1",
        "fit 4/5, 0:24, 0:06 left, 4 done, layer 3",
        "fit 5/5, 0:30, 0:00 left, 5 done",
    ]


@pytest.mark.parametrize("mode", ["none", "bar"])
def test_nothing_is_printed_where_it_is_not_wanted_or_there_is_no_terminal(
    mode: progress.Mode, capsys: pytest.CaptureFixture[str]
) -> None:
    show_progress(mode)
    with progress_bar("fit", 2) as bar:
        bar.now("layer")
        bar.advance(2)
    assert bar.done() == "2/2"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == ""


def test_a_bar_shows_titles_and_labels_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("fit [b]", 1, True) as bar:
        bar.now("layers[0] :smile:")
        bar.so_far("9 -> 4 params")
        bar.advance()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert re.search(r"fit \[b\].*1/1 .*0:00, 0:00 left .*9 -> 4 params .*layers\[0\] :smi", shown)


@pytest.mark.parametrize("show", [None, False])
def test_nothing_is_printed_where_no_bar_can_be_drawn(show: bool | None, capfd: pytest.CaptureFixture[str]) -> None:
    """A bar of rich that is turned off ends in an empty line, with rich 13 and 14."""
    with progress_bar("fit", 2, show) as bar:
        bar.advance()
    assert capfd.readouterr() == ("", "")
