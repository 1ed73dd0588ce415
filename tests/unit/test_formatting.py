"""Durations, instants and numbers as the page and the command line show them."""

from datetime import UTC, datetime, timedelta, timezone

from firstclaim.formatting import age, ago, instant, number_of_events, thousands


def test_a_duration_is_in_its_largest_unit() -> None:
    """Seconds, minutes, hours or days, rounded to a whole number."""
    assert [age(seconds) for seconds in (0.2, 59, 90, 7200, 200_000)] == ["0 s", "59 s", "2 min", "2 h", "2 d"]


def test_a_distance_says_whether_it_is_past() -> None:
    """An instant before now is `ago`, one after now is `in`, and less than half a second from now is `now`."""
    assert ago(datetime.now(UTC) - timedelta(minutes=5)) == "5 min ago"
    assert ago(datetime.now(UTC) + timedelta(minutes=5, seconds=1)) == "in 5 min"
    assert ago(datetime.now(UTC) + timedelta(seconds=0.4)) == "now"


def test_an_instant_is_in_utc() -> None:
    """Whatever zone the instant has."""
    assert instant(datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))) == "2025-12-31 23:30:00"


def test_thousands_are_grouped() -> None:
    """By a thin space, so that a large number can be read."""
    assert thousands(1234567) == "1\u2009234\u2009567"


def test_one_event_is_not_events() -> None:
    """The noun agrees with the number."""
    assert [number_of_events(number) for number in (0, 1, 2)] == ["0 events", "1 event", "2 events"]
