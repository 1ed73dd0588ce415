"""Columns of the commands at several widths: every line fits, and what one copies is whole."""

import io

import pytest
from rich.console import Console

from firstclaim.cli import terminal
from firstclaim.server.check import Check, fail, ok, warn

ID = "evt_1Sca5RKdVq2Wn7RtLxQt0Jx7"
ERROR = "ProgrammingError: relation [access] does not exist, and more of it that needs another line or two"
PATH = "/srv/shop/" + "a-folder-with-a-long-name/" * 8 + "handlers.py:12"
CHECKS: list[Check] = [
    ok("postgres", "version 17.2"),
    warn("fsync", "fsync = off: a crash of the machine can lose events that were answered with 200; turn it on"),
    fail("a_check_of_a_longer_name", ERROR),
]
WIDTHS = [40, 60, 80, 120]


def printed(monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    """The lines of an event's fields and of the checks, on a terminal of that width."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    monkeypatch.setattr(terminal, "out", console)
    terminal.print_field("event_id", ID)
    terminal.print_field("last_error", ERROR)
    terminal.print_field("2026-11-29 12:00:00.123", f"attempt 1 failed: {ERROR}")
    terminal.print_field("", "  shop/handlers.py:12 in grant_access")
    terminal.print_field("nothing", "")
    terminal.print_checks(CHECKS)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_line_fits_and_no_word_is_broken(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """At every width all words are there, and those of a value are indented."""
    lines = printed(monkeypatch, width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for text in (ID, ERROR, "version 17.2", "shop/handlers.py:12 in grant_access", *(each.detail for each in CHECKS)):
        assert set(text.split()) <= set(words)
    heads = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert heads == ["event_id", "last_error", "2026-11-29", "nothing", "ok", "warn", "fail"]


def test_a_narrow_terminal_has_the_value_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an id would not fit beside its name, it stands on the next line; a short value stays beside it."""
    lines = printed(monkeypatch, 40)
    assert lines[:2] == ["event_id", f"  {ID}"]
    assert "ok    postgres             version 17.2" in lines
    assert "    shop/handlers.py:12 in grant_access" in lines


def test_a_word_longer_than_a_line_is_left_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is printed in one piece, so that it can be copied."""
    console = Console(file=io.StringIO(), width=40, highlight=False)
    monkeypatch.setattr(terminal, "out", console)
    terminal.print_field("", PATH)
    terminal.print_field("file", PATH)
    assert isinstance(console.file, io.StringIO)
    assert [line.strip() for line in console.file.getvalue().splitlines()] == [PATH, "file", PATH]


def test_a_file_gets_a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe nothing is wrapped, whatever the terminal's width is."""
    assert len(printed(monkeypatch, 10_000)) == 5 + len(CHECKS)
