"""The list of events at several widths: ids, types and statuses are whole, and every line fits."""

import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from firstclaim.cli import event_list, terminal
from firstclaim.operations.queries import EventRow
from firstclaim.status import Status

NOW = datetime.now(UTC)
PAID = EventRow(
    event_id="evt_1Sca5RKdVq2Wn7RtLxQt0Jx7",
    type="invoice.paid",
    account=None,
    livemode=False,
    object_id=None,
    api_version=None,
    status=Status.COMPLETED,
    attempt=1,
    failures=0,
    abandoned=0,
    action="access_granted",
    last_error=None,
    created_at=NOW,
    received_at=NOW - timedelta(minutes=3),
    due_at=NOW,
    give_up_at=NOW,
    settled_at=NOW,
    claimed_at=None,
    claimed_by=None,
)
FAILED = replace(
    PAID,
    event_id="evt_1Sca5RKdVq2Wn7RtLxQt0Jx8",
    type="customer.subscription.trial_will_end",
    status=Status.FAILED,
    attempt=12,
    last_error="ProgrammingError: relation [access] does not exist, and more of it that needs another line or two",
)
IGNORED = replace(PAID, event_id="evt_1Sca5RKdVq2Wn7RtLxQt0Jx9", status=Status.IGNORED, action=None)
ROWS = [PAID, FAILED, IGNORED]


def printed(monkeypatch: pytest.MonkeyPatch, width: int, rows: list[EventRow] = ROWS) -> str:
    """What the command prints on a terminal of that width."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for module in (event_list, terminal):
        monkeypatch.setattr(module, "out", console)
    event_list.print_events(rows)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 140, 200])
def test_nothing_is_cut_and_every_line_fits(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """At every width ids, types and statuses can be copied, and all words of a long error are there."""
    text = printed(monkeypatch, width)
    assert all(len(line) <= width for line in text.splitlines())
    for row in ROWS:
        assert row.event_id in text
        assert row.type in text
        assert row.status in text
    assert "access_granted" in text
    assert "\u2026" not in text
    assert FAILED.last_error is not None
    assert set(FAILED.last_error.split()) <= set(text.split())


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_has_no_table(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Each event begins at the margin, and only an event does."""
    text = printed(monkeypatch, width)
    heads = [line.split()[0] for line in text.splitlines() if not line.startswith(" ")]
    assert heads == [row.event_id for row in ROWS]


def test_a_file_gets_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe each event is one line, whatever the terminal's width is."""
    lines = printed(monkeypatch, 10_000).splitlines()
    assert lines[0].split() == ["event", "type", "status", "attempts", "received", "result"]
    assert len(lines) == 1 + len(ROWS)


def test_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty list says so."""
    assert printed(monkeypatch, 80, []) == "no events\n"
