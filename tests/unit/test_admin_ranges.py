"""Ranges of time in addresses, and the filters of the list that are made of them."""

from datetime import UTC, datetime, timedelta

import pytest

from firstclaim.admin.events import Filters
from firstclaim.admin.ranges import DEFAULT, Range, as_text, parse_instant
from firstclaim.operations.traffic import TimeRange

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)


def test_an_own_range() -> None:
    """Two instants without a zone are of UTC; links to the list and to the page have the same range."""
    own = Range.of(None, "2026-11-25T12:00", "2026-11-25T13:30:05")
    assert own.own == TimeRange(NOON, NOON + timedelta(seconds=5405))
    assert own.words == "from 2026-11-25 12:00 to 2026-11-25 13:30"
    assert Range.of(None, own.filters["since"], own.filters["until"]) == own
    filters = Filters.of({name: [value] for name, value in own.filters.items()})
    assert (filters.search.selection.since, filters.search.selection.until) == (NOON, NOON + timedelta(seconds=5405))
    assert filters.address("/admin") == "/admin/events?since=2026-11-25T12%3A00%3A00&until=2026-11-25T13%3A30%3A05"


@pytest.mark.parametrize(
    ("name", "since", "until"),
    [
        (None, None, None),
        ("x", "y", "z"),
        (None, "2026-11-25T12:00", "2026-11-25T12:00"),
        (None, None, "2026-11-25T12:00"),
        (None, "9" * 300, None),
    ],
)
def test_no_range_is_the_default(name: str | None, since: str | None, until: str | None) -> None:
    """An address without a range, or with one that is empty or no range, shows the last day."""
    assert Range.of(name, since, until) == Range(DEFAULT)


@pytest.mark.parametrize(
    ("since", "until"),
    [("0001-01-01T00:00", "9999-12-31T23:59"), ("2026-11-25", "9999-12-31T23:59"), ("0001-01-01", "2026-11-25")],
)
def test_a_range_to_the_end_of_the_calendar(since: str, until: str) -> None:
    """It can be widened to whole bars of a chart, whatever their length: nothing leaves the calendar."""
    own = Range.of(None, since, until).own
    assert own is not None
    assert own.until + own.step > own.until
    assert own.since - own.step < own.since


def test_a_range_before_all_events_is_the_default() -> None:
    """Both of its ends are moved to the same instant."""
    assert Range.of(None, "0001-01-01", "0001-01-02") == Range(DEFAULT)


def test_a_range_without_an_end_ends_with_this_minute() -> None:
    """Its end is the next full minute, so that a page which refreshes itself has the same range for a while."""
    own = Range.of(None, "2026-11-25T12:00", "").own
    assert own is not None
    assert (own.until.second, own.until.microsecond) == (0, 0)
    assert 0 < (own.until - datetime.now(UTC)).total_seconds() <= 60


def test_a_named_range_is_an_age_of_the_list() -> None:
    """The list takes the same name."""
    for name in ("1h", "24h", "7d"):
        assert Filters.of({key: [value] for key, value in Range.of(name, None, None).filters.items()}).age == name


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-11-25T12:00", NOON),
        ("2026-11-25T13:00:00+01:00", NOON),
        ("2026-11-25", NOON.replace(hour=0)),
        ("noon", None),
        ("0001-01-01T00:00+23:00", None),
        (None, None),
    ],
)
def test_an_instant(text: str | None, at: datetime | None) -> None:
    """With or without a zone; what is none is None."""
    assert parse_instant(text) == at
    assert at is None or parse_instant(as_text(at)) == at


@pytest.mark.parametrize(
    ("seconds", "step"), [(60, 60), (3600, 60), (86_400, 1800), (7 * 86_400, 10_800), (400 * 86_400, 604_800)]
)
def test_a_range_has_at_most_sixty_bars(seconds: float, step: int) -> None:
    """The bars are as short as sixty allow, of a round length."""
    within = TimeRange(NOON - timedelta(seconds=seconds), NOON)
    assert within.step == timedelta(seconds=step)
    assert seconds / step <= 60


def test_filters_in_words() -> None:
    """What a replay says before it is confirmed, and writes into the audit."""
    filters = Filters.of(
        {"q": ["cus_1"], "status": ["dead"], "type": ["a.*,b"], "age": ["1h"], "since": ["2026-11-25"]}
    )
    assert filters.words == "status dead; type a.*,b; id cus_1; received last hour; since 2026-11-25T00:00:00"
    assert Filters().words == ""
